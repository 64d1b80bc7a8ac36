"""What is compared: this library, chains written by hand, other packages, and bounds that do less work than
asked for.
"""

from __future__ import annotations

from mingle.bench.peers import captured, handmade, library, merged, ours
from mingle.bench.peers.peer import Peer, Unavailable

__all__ = ["OURS", "PEERS", "STRATEGIES", "Peer", "Unavailable"]

#: ratios are relative to this peer
OURS = "mingle"

#: by name, in the order of tables
PEERS: dict[str, Peer] = {
    peer.name: peer for module in (ours, handmade, captured, merged, library) for peer in module.PEERS
}

#: ways to compute a case among which `backend="auto"` chooses, or could have
STRATEGIES = (OURS, *(f"mingle {backend}" for backend in ours.EXPLICIT), "grouped eager", "fold eager")

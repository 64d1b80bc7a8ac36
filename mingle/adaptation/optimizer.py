"""One step for the gates of all layers: check, projection and Adam on flat gradients.

Nothing in it waits for a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mingle import ranks
from mingle.adaptation.batches import Share
from mingle.adaptation.projector import RelaxedProjector
from mingle.nn.linear import MingleLinear

logger = logging.getLogger(__name__)

#: a batch, pass by pass → the loss and whether the step was skipped, both []
Advance = Callable[[Sequence[Share]], tuple[Tensor, Tensor]]


class GateStep:
    """Adam on the trainable gates of `layers`, behind the relaxed projector.

    The gates' gradients are views of one flat tensor, which backward passes fill; weights are projected,
    biases are not.  A step whose loss or gradient is not finite changes nothing: neither gates, nor Adam's
    moments, nor S.  Of several processes each differentiates its part of the loss, and `step` adds up their
    losses and gradients before anything else: all then project, skip and step alike.

    Args:
        layers: the injected layers by name.
        lr: Adam's learning rate, or one for each layer by name.
        projector: of the same layers; None trains unconstrained.
    """

    def __init__(
        self,
        layers: Mapping[str, MingleLinear],
        lr: float | Mapping[str, float],
        projector: RelaxedProjector | None = None,
    ) -> None:
        if projector is None:
            projector = RelaxedProjector(
                {name: layer.gate_weight.new_empty(layer.in_features, 0) for name, layer in layers.items()}
            )
        self.projector = projector
        biases = sum(layer.gate_bias.numel() for layer in layers.values())
        self.layout = projector.layout(
            {name: len(layer.gate_weight) for name, layer in layers.items()}, loose=biases + 1
        )
        self.gates = [gate for layer in layers.values() for gate in (layer.gate_weight, layer.gate_bias)]
        self.gradients = self.gates[0].new_zeros(self.layout.size)
        self.views = self.layout.views(self.gradients)
        *bias_views, self._loss = self.layout.loose(self.gradients).split(
            [*(len(layer.gate_bias) for layer in layers.values()), 1]
        )
        for (name, layer), view in zip(layers.items(), bias_views, strict=True):
            layer.gate_weight.grad, layer.gate_bias.grad = self.views[name], view
        groups: list[dict[str, Any]] = [{"params": self.gates, "lr": lr}]
        if isinstance(lr, Mapping):
            groups = [
                {"params": [layer.gate_weight, layer.gate_bias], "lr": lr[name]}
                for name, layer in layers.items()
            ]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=self.gradients.is_cuda)

    @property
    def loss(self) -> Tensor:
        """Of the last step, that of all processes, []."""
        return self._loss[0]

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def step(self, loss: Tensor) -> Tensor:
        """Project and step, after `loss` [], this process's part, was differentiated.

        Returns:
            float32 []: 1 where the step was skipped because something is not finite, else 0.
        """
        self._loss.copy_(loss.detach())  # checked together with the gradients
        ranks.sum_(self.gradients)
        skipped = self.projector.project_(self.gradients, self.layout).float()
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        return skipped

    def finite(self) -> Tensor:
        """Whether the gradient of each layer's gate weight is finite, in the order of `names`: bool [L]."""
        parts = [block.gradients(self.gradients).isfinite().flatten(1).all(1) for block in self.layout.blocks]
        return torch.cat(parts)

    @property
    def names(self) -> list[str]:
        return [name for block in self.layout.blocks for name in block.names]

    def state(self) -> list[Tensor]:
        """What a step changes besides Adam's moments: the gates and S."""
        return [*(gate.detach() for gate in self.gates), self.projector.interferences]


def captured(advance: Advance, step: GateStep, batch_size: int, device: torch.device) -> Advance:
    """`advance`, a whole step from the samples of a batch to new gates, as one CUDA graph.

    Where it cannot be captured, `advance` itself is returned.

    Args:
        advance: given a batch in one pass; calls `step` once.
        step: what `advance` changes; back in its present state when this returns.
        batch_size: of every batch to come.
        device: where all of it runs.
    """
    share, graph = Share(torch.arange(batch_size, device=device), 1.0), torch.cuda.CUDAGraph()
    before = [tensor.clone() for tensor in step.state()]
    with torch.cuda.device(device):  # a capture is of the current one
        present, side = torch.cuda.current_stream(), torch.cuda.Stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random = generator.clone_state()
        side.wait_stream(present)
        try:
            with torch.cuda.stream(side):
                for _ in range(3):
                    advance([share])
            present.wait_stream(side)
            with torch.cuda.graph(graph):
                results = advance([share])
        except RuntimeError as error:
            logger.info("steps run one by one: they cannot be captured in a CUDA graph: %s", error)
            # where the capture's end raised, its stream is still the current one, and the generator in it
            torch.cuda.set_stream(present)
            generator.graphsafe_set_state(random)
            torch.cuda.synchronize()
            return advance
        finally:
            _reset(step, before)

    def replay(passes: Sequence[Share]) -> tuple[Tensor, Tensor]:
        (chosen,) = passes
        share.samples.copy_(chosen.samples)
        graph.replay()
        return results

    return replay


@torch.no_grad()
def _reset(step: GateStep, before: list[Tensor]) -> None:
    """Undo the changes of the warm-up; Adam had no moments before its first step."""
    for state in step.optimizer.state.values():
        for value in state.values():
            value.zero_()
    for tensor, value in zip(step.state(), before, strict=True):
        tensor.copy_(value)

"""The jobs for clusters: they are what their systems read, and the command in them is one of ours."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

from mingle.cli import parsers

EXAMPLES = Path(__file__).parents[2] / "examples"


def checked(words):
    """The arguments of torchrun, once mingle's parser has taken those of the merge in them."""
    launch = get_args_parser().parse_args(words)
    assert (launch.module, launch.training_script) == (True, "mingle")
    merge = parsers()[0].parse_args(launch.training_script_args)
    assert merge.command == "merge" and merge.shared
    return launch


def test_slurm():
    script = EXAMPLES / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).returncode == 0
    text = script.read_text()
    [command] = re.findall(r"srun .*? torchrun (.*)", text.replace("\\\n", " "))
    launch = checked(shlex.split(command.replace("$SLURM_JOB_NUM_NODES", "4")))
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert launch.nnodes == directives["nodes"] and launch.nproc_per_node == directives["gpus-per-node"]
    assert directives["ntasks-per-node"] == "1"


def test_kubernetes():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes-job.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    launch = checked(container["args"])
    pods = {job["spec"][key] for key in ("completions", "parallelism")}
    assert pods == {int(launch.nnodes)}
    assert int(launch.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, _, _ = launch.rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}

"""A model that mingle does not know, in plain PyTorch: a task type of three lines is all that it takes."""

import copy

import torch
from torch import nn

import mingle
from mingle.tasks import TaskData, TaskType


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Sequential):
    def __init__(self) -> None:
        blocks = nn.Sequential(Block(32), Block(32))
        super().__init__(nn.Linear(8, 32), blocks, nn.Linear(32, 4))


class Points(TaskType):
    def logits(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        return model(data.inputs["point"])


def samples(task: int, n: int) -> dict[str, torch.Tensor]:
    """Four clusters on a circle; in each task their names are turned by one, and they lie elsewhere."""
    labels = torch.randint(4, (n,))
    angle = 1.57 * (labels + task)
    point = torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(n, 2)
    place = 3.0 * nn.functional.one_hot(torch.tensor(task), 6).expand(n, 6)
    return {"point": torch.cat([point, place], 1), "labels": labels}


def trained(model: nn.Module, task: int) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = samples(task, 64)
        nn.functional.cross_entropy(model(batch["point"]), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


torch.manual_seed(0)
base = trained(Net(), 0)
suite = {str(task): samples(task, 500) for task in (1, 2, 3)}
for method, options in (("average", {}), ("mingle", {"rank": 16, "steps": 30, "lr": 1e-2})):
    merger = mingle.Merger(base, method, Points(), **options)
    for task in (1, 2, 3):
        merger.add(str(task), trained(base, task), samples(task, 20))
        merger.evaluate(suite)
    print(f"{method}: ACC {merger.result().acc:.0f} %")

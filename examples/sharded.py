"""Groups whose workers share one model by FSDP2: torchrun --nproc-per-node 4 examples/sharded.py --groups 2"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import abtrain

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--groups", type=int, default=2, help="as a rule one for each machine")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="sharded.safetensors")
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), *[Block() for _ in range(4)], nn.Linear(64, 1))


device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, workers = dist.get_rank(), dist.get_world_size() // args.groups

# A row of the mesh is a group, of consecutive ranks. Each group shares one model; abtrain merges between the groups.
mesh = init_device_mesh(device, (args.groups, workers), mesh_dim_names=("groups", "places"))
torch.manual_seed(0)
model = build().to(device)
for part in model:
    fully_shard(part, mesh=mesh["places"])
fully_shard(model, mesh=mesh["places"])

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
recipe = abtrain.recipes.local_sgd(args.steps, every=10, wire="int4")
ab = abtrain.ABTraining(model, optimizer, recipe, group_size=workers)
generator = torch.Generator().manual_seed(rank)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16, generator=generator)
    return x.to(device), x.sin().sum(1, keepdim=True).to(device)


while not ab.finished:
    x, y = batch()
    loss = F.mse_loss(ab(x), y)
    loss.backward()
    ab.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    ab.step()

with ab.merged(), torch.no_grad():
    x, y = batch()
    error = F.mse_loss(model(x), y).item()  # all workers of a group run the model together
    if rank < workers:
        ab.save(args.out)  # called by all workers of one group; the first of them writes
sent = ab.bytes_sent / 1e6
ab.close()

if rank == 0:
    whole = build()
    abtrain.load(whole, args.out)
    print(f"error {error:.3f}, {sent:.2f} MB sent by this worker for merges")
    print(f"weights_digest={abtrain.weights_digest(whole)}")
dist.destroy_process_group()

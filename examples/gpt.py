"""A byte-level GPT from scratch: python examples/gpt.py, or torchrun --nproc-per-node 4 examples/gpt.py"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import abtrain

CONTEXT = 64  # bytes that the model sees


class Block(nn.Module):
    """A pre-norm transformer block with causal attention: (N, T, width) to (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model over bytes, (N, T) to logits (N, T, 256). Embedding and head are one weight."""

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.head.weight, std=width**-0.5)  # logits of variance 1

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5 + self.position(places)
        return self.head(self.norm(self.blocks(x)))


def join() -> tuple[int, torch.device]:
    """Joins the other workers if torchrun started this one. Returns its rank and its device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        return 0, device
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), device


def python_sources() -> tuple[Tensor, Tensor]:
    """Returns the bytes of Python's own library to train on, and every 20th file to validate on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::20]
    texts = (b"".join(f.read_bytes() for f in some) for some in ([f for f in files if f not in held_out], held_out))
    train, valid = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return train, valid


def batch(text: Tensor, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns windows of the text at random places, and for each byte the byte after it: both (size, CONTEXT)."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)].to(device, torch.long)
    return windows[:, :-1], windows[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, device: torch.device) -> float:
    """Returns the mean loss on 512 windows, the same ones in each call, in nats per byte."""
    x, y = batch(text, 512, torch.Generator().manual_seed(0), device)
    return loss_of(model(x), y).item()


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up for 50 steps, then down as a cosine."""
    return min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def write(model: nn.Module, start: str, length: int, device: torch.device) -> str:
    """Continues a text by bytes that the model draws."""
    text, generator = list(start.encode()), torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = model(torch.tensor([text[-CONTEXT:]], device=device))[0, -1]
        text.append(int(torch.multinomial((logits / 0.7).softmax(0).cpu(), 1, generator=generator)))
    return bytes(text).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="ab_local")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=8e-3)
    args = parser.parse_args()
    rank, device = join()
    train, valid = python_sources()
    torch.manual_seed(0)
    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    ab = abtrain.ABTraining(model, optimizer, abtrain.recipes.from_text(args.recipe, args.steps))
    if rank == 0:
        print(ab.describe())
    draws = torch.Generator().manual_seed(1 + rank)  # other windows for each worker

    while not ab.finished:
        x, y = batch(train, 8, draws, device)
        loss_of(ab(x), y).backward()
        ab.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ab.step()
        if ab.steps_done % 200 == 0:
            with ab.merged() as average:  # on all workers, at the same step
                loss = validate(average, valid, device)
            if rank == 0:
                print(f"{ab.progress()}  validation loss {loss:.3f} nats per byte")

    sent = ab.communicator.meter.payload()["total"]
    if rank == 0:
        print(f"factored {ab.compression:.2f} : 1, {sent / 1e6:.2f} MB sent by each worker")
        print(write(model, "def ", 200, device))
        torch.save(ab.dense_state_dict(), "gpt.pt")
    ab.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

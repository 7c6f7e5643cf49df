"""Fine-tunes the GPT of gpt.py with LoRA: python examples/lora.py, or torchrun --nproc-per-node 4 examples/lora.py"""

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from gpt import GPT, batch, join, loss_of, rate, validate, write
from torch import Tensor, nn

import abtrain


class LoRA(nn.Module):
    """A frozen linear layer W, and a change of rank r that is trained: x to W x + 2 B A x. B starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Linear(layer.in_features, rank, bias=False)
        self.B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * self.B(self.A(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Adds the change to the weight. Returns the plain layer."""
        self.layer.weight += 2 * self.B.weight @ self.A.weight
        return self.layer


def add_adapters(model: GPT, rank: int) -> None:
    """Freezes the model, and gives each linear layer of its blocks an adapter."""
    model.requires_grad_(False)
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            model.blocks.set_submodule(name, LoRA(layer, rank))


def merge_adapters(model: GPT) -> None:
    """Turns the model back into one of plain layers."""
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, LoRA):
            model.blocks.set_submodule(name, layer.merged())


def python_manual() -> tuple[Tensor, Tensor]:
    """Returns the help texts of Python as bytes to train on, and every 20th to validate on."""
    texts = [topics[name].encode() for name in sorted(topics)]
    held_out = texts[::20]
    parts = (b"".join(text for text in texts if text not in held_out), b"".join(held_out))
    train, valid = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, valid


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="local_sgd:every=6,wire=ternary")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    if not Path("gpt.pt").exists():
        sys.exit("gpt.pt is not in this folder: python examples/gpt.py writes it")
    worker, device = join()
    train, valid = python_manual()
    model = GPT().to(device)
    model.load_state_dict(torch.load("gpt.pt", map_location=device))
    before = validate(model, valid, device)
    torch.manual_seed(0)
    add_adapters(model, args.rank)
    model.to(device)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=args.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    ab = abtrain.ABTraining(model, optimizer, abtrain.recipes.from_text(args.recipe, args.steps))
    draws = torch.Generator().manual_seed(1 + worker)  # other windows for each worker

    while not ab.finished:
        x, y = batch(train, 8, draws, device)
        loss_of(ab(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ab.step()

    sent = ab.communicator.meter.payload()["total"]
    ab.close()
    merge_adapters(model)
    after = validate(model, valid, device)
    if worker == 0:
        print(f"{sum(p.numel() for p in adapters):,} of {sum(p.numel() for p in model.parameters()):,} numbers trained")
        print(f"validation loss {before:.3f} before, {after:.3f} after; {sent / 1e6:.2f} MB sent by each worker")
        print(write(model, "The ", 200, device))
        torch.save(model.state_dict(), "tuned.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

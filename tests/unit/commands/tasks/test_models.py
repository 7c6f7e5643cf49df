import pytest
import torch
from torch import Tensor, nn

from abtrain.commands.tasks import models


@pytest.mark.parametrize(
    ("build", "batch", "output", "parameters"),
    [
        (models.digits_mlp, torch.rand(3, 64), (3, 10), 85_002),
        (models.fashion_cnn, torch.rand(3, 1, 28, 28), (3, 10), 866_042),
        (models.VisionTransformer, torch.rand(3, 1, 28, 28), (3, 10), 454_858),
        (models.GPT, torch.randint(256, (3, 128)), (3, 128, 256), 875_264),
    ],
)
def test_shape_and_size(build: type[nn.Module], batch: Tensor, output: tuple[int, ...], parameters: int) -> None:
    model = build()
    assert model(batch).shape == output
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_parameter_learns() -> None:
    for build, batch in (
        (models.fashion_cnn, torch.rand(3, 1, 28, 28)),
        (models.VisionTransformer, torch.rand(3, 1, 28, 28)),
        (models.GPT, torch.randint(256, (3, 128))),
    ):
        model = build()
        model(batch).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name


def test_gpt_does_not_look_ahead() -> None:
    model = models.GPT().eval()
    tokens = torch.randint(256, (1, 128))
    changed = tokens.clone()
    changed[0, 64:] = (changed[0, 64:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :64], after[0, :64])
    assert not torch.allclose(before[0, 64:], after[0, 64:])


def test_orthogonal_init_reaches_every_matrix_and_no_vector() -> None:
    model = models.fashion_cnn()
    vectors = {name: p.clone() for name, p in model.named_parameters() if p.ndim < 2}
    models.orthogonal_init(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, vectors[name]), name
        else:
            singular_values = torch.linalg.svdvals(parameter.detach().flatten(1))
            torch.testing.assert_close(singular_values, torch.ones_like(singular_values), atol=1e-4, rtol=0)

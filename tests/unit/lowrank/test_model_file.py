"""Model files: what is saved is loaded, in either form, and what does not fit changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import abtrain
from abtrain import ABTraining, FixedRank, recipes
from abtrain.errors import CheckpointError, ConfigurationError, UsageError
from abtrain.lowrank.model_file import load, save_model
from abtrain.lowrank.plain import to_plain
from tests.cases import MODELS, adamw, batch, build


def trained(kind: str = "mlp") -> tuple[nn.Module, ABTraining]:
    model = build(kind)
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipes.ab_outer(12, every=2, warmup_steps=4, rank_rule=FixedRank(2)))
    for step in range(8):
        x, y = batch(kind, 0, step)
        nn.functional.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return model, ab


def save(ab: ABTraining, folder: Path, form: str = "factored") -> None:
    state = ab.factored_state_dict() if form == "factored" else ab.dense_state_dict()
    save_model(folder / "m.safetensors", state, {"form": form, "step": ab.steps_done})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", ["factored", "dense"])
def test_it_is_loaded_into_the_model_as_it_was_built(kind: str, form: str, tmp_path: Path) -> None:
    model, ab = trained(kind)
    save(ab, tmp_path, form)
    x, _ = batch(kind, 0, 9)
    other = build(kind, seed=1)
    about = load(other, tmp_path / "m.safetensors")
    assert about == {"form": form, "step": 8}
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(to_plain(other)(x), model(x), rtol=0, atol=1e-12)
    assert other.state_dict().keys() == build(kind).state_dict().keys()
    # Again, over what is loaded.
    load(other, tmp_path / "m.safetensors")
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)


def test_the_dense_file_is_any_code_s(tmp_path: Path) -> None:
    model, ab = trained()
    save(ab, tmp_path, "dense")
    other = build("mlp", seed=1)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))
    x, _ = batch("mlp", 0, 9)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)


def test_a_factored_file_is_smaller(tmp_path: Path) -> None:
    _, ab = trained()
    save(ab, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert tensors["0.weight.A"].shape == (16, 2) and "0.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) < sum(p.numel() for p in build("mlp").parameters())


def test_tied_weights_and_values_of_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    save_model(tmp_path / "m", model.state_dict(), {})
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    other[1].weight = other[0].weight
    assert load(other, tmp_path / "m") == {}
    assert other[0].weight.dtype == torch.float64 and torch.equal(other[1].weight, model[0].weight.double())


def changed(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.weight.A"), "lacks 0.weight"),
        (lambda t: t.pop("0.weight.B"), r"factors of 0.weight that do not belong together \(.* and missing\)"),
        (lambda t: t.pop("2.bias"), "lacks 2.bias"),
        (lambda t: t.update(more=torch.zeros(2)), "has more, which the model does not have"),
        (lambda t: t.update({"0.bias": torch.zeros(3)}), "0.bias of shape"),
        (lambda t: t.update({"0.weight.B": torch.zeros(3, 10)}), "factors of 0.weight that do not belong together"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: object, message: str, tmp_path: Path) -> None:
    save(trained()[1], tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    change(tensors)  # type: ignore[operator]
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    model = build("mlp")
    before = changed(model)
    with pytest.raises(CheckpointError, match=message):
        load(model, tmp_path / "m.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_named_in_the_order_of_the_model(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(7, 1, 1) for name in build("mlp").state_dict()}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as told:
        load(build("mlp"), tmp_path / "m.safetensors")
    places = [str(told.value).index(f"has {name} of shape") for name in list(build("mlp").state_dict())[:4]]
    assert places == sorted(places)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\xff" * 64])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a model file"):
        load(build("mlp"), tmp_path / "m")


def test_a_model_in_training_is_not_loaded_into(tmp_path: Path) -> None:
    model, ab = trained()
    save(ab, tmp_path)
    with pytest.raises(UsageError, match=r"ab\.close\(\)"):
        load(model, tmp_path / "m.safetensors")
    ab.close()
    load(model, tmp_path / "m.safetensors")
    with pytest.raises(ConfigurationError, match="has the factors of another run"):
        ABTraining(model, adamw(model.parameters()), recipes.ddp(2))


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    _, ab = trained()
    (tmp_path / "m").write_text("kept")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_model(tmp_path / "nowhere" / "m", ab.dense_state_dict(), {})
    with pytest.raises(UsageError, match="count is not a tensor"):
        save_model(tmp_path / "m", {"count": 3}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"] and (tmp_path / "m").read_text() == "kept"


def test_the_engine_saves_both_forms(tmp_path: Path) -> None:
    model, ab = trained()
    x, _ = batch("mlp", 0, 9)
    for form in ("factored", "dense"):
        with ab.merged():
            ab.save(tmp_path / form, form)
        other = build("mlp", seed=1)
        assert abtrain.load(other, tmp_path / form) == {"form": form, "recipe": "ab_outer", "step": 8}
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    assert (tmp_path / "factored").stat().st_size < (tmp_path / "dense").stat().st_size
    with pytest.raises(ConfigurationError, match="form='small' is unknown: use 'factored' or 'dense'"):
        ab.save(tmp_path / "small", "small")  # type: ignore[arg-type]


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    contents = set()
    for i in range(8):
        save_model(tmp_path / "m", {"w": torch.arange(4.0)}, {"form": "dense", "step": 3, "recipe": "é"})
        contents.add((tmp_path / "m").read_bytes())
        assert safetensors.torch.load_file(tmp_path / "m")["w"].tolist() == [0, 1, 2, 3], i
    assert len(contents) == 1


def test_what_is_saved_after_the_factors_are_gone_is_dense_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, ab = trained()
    ab.close()
    caplog.clear()
    ab.save(tmp_path / "late")
    assert "writes dense weights, since ab.close() has multiplied the factors out" in caplog.text
    assert abtrain.load(build("mlp", seed=1), tmp_path / "late")["form"] == "dense"


def test_factors_of_another_model_are_named_by_their_product(tmp_path: Path) -> None:
    _, ab = trained()
    with ab.merged():
        ab.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"has factors of a 16 x 10 matrix for 0.weight, which is 32 x 10 here"):
        abtrain.load(nn.Sequential(nn.Linear(10, 32), *build("mlp")[1:]), tmp_path / "m")  # type: ignore[index]

"""Old names of options lead to the new ones; wrong names to the likely ones."""

import pytest

from detr.config import compose
from detr.config.moved import MOVED, moved
from detr.errors import UserError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.transformer.num_encoder_layers", "model.encoder.num_layers"),
        ("model.transformer.decoder_norm", "model.decoder.final_norm"),
        ("model/position", "model/encoder/position"),
        ("model/position/learned", "model/encoder/position=learned"),
        ("model.position.temperature", "model.encoder.position.temperature"),
        ("model.position.centre", "model.encoder.position.center"),
        ("criterion.giou_weight", "criterion.terms.giou.weight"),
    ],
)
def test_the_message_says_the_new_name(old: str, new: str) -> None:
    assert moved(old) == f"{old} has moved: set {new}."


def test_shared_options_of_the_transformer_name_both_parts() -> None:
    message = (
        "model.transformer.nhead has moved: set model.encoder.nhead, or model.decoder.nhead for the decoder alone."
    )
    assert moved("model.transformer.nhead") == message


@pytest.mark.parametrize("name", ["model.num_queries", "model.transformers", "model.positions.x", "epochs", ""])
def test_other_names_have_no_message(name: str) -> None:
    assert moved(name) is None


def test_no_new_name_is_an_old_one() -> None:
    for new in MOVED.values():
        assert not any(moved(word.rstrip(",")) for word in new.split())


@pytest.mark.parametrize("old", MOVED)
def test_every_old_name_is_gone_and_reported(old: str) -> None:
    name = f"{old}x" if old.endswith((".", "/")) else old
    for override in (f"{name}=1", f"+{name}=1"):
        with pytest.raises(UserError) as found:
            compose(["model/attention=dual", override])
        assert str(found.value) == moved(name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.boxes.count=3"],
        ["+model.boxes.count=3"],
        ["+model.boxes={count: 3}"],
        ["data.root=${model.boxes.count}"],
    ],
)
def test_compose_reports_an_old_name(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVED, "model.boxes.count", "model.num_queries")
    with pytest.raises(UserError) as found:
        compose(overrides)
    assert str(found.value) == "model.boxes.count has moved: set model.num_queries."


@pytest.mark.parametrize("override", ["model/boxes=many", "+model/boxes=many", "model/boxes@model.x=many"])
def test_compose_reports_an_old_group(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVED, "model/boxes", "model/queries")
    monkeypatch.setitem(MOVED, "model/boxes/", "model/queries=")
    with pytest.raises(UserError, match=r"^model/boxes(/many)? has moved: set model/queries(=many)?\.$"):
        compose([override])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("epochs", "trainer.epochs"),
        ("lr", "optimizer.lr"),
        ("batch_size", "data.batch_size"),
        ("trainer.epoch", "trainer.epochs"),
        ("optimiser.lr", "optimizer.lr"),
        ("backbone", "model/backbone"),
        ("model/backbon", "model/backbone"),
    ],
)
def test_a_wrong_name_leads_to_the_likely_one(name: str, meant: str) -> None:
    with pytest.raises(UserError) as found:
        compose([f"{name}=1"])
    assert str(found.value) == f"There is no option {name}. Did you mean {meant}?"


def test_a_name_like_no_other_is_reported_on_one_line() -> None:
    with pytest.raises(UserError, match=r"^Could not override 'foobar'\. .*'foobar' not in 'TrainConfig'.*$"):
        compose(["foobar=1"])

"""The configuration: defaults < file < command line, and every mistake said in one line."""

import json
from pathlib import Path

import pytest

from megawan import cli, config


def parse(*argv: str) -> config.TrainConfig:
    return config.parse(argv, prog="train.py", description="d")


def test_round_trip_through_json() -> None:
    original = parse(
        "--steps", "7", "--optim.learning_rate", "1", "--output", "/tmp/x y", "--data.path", "store"
    )
    restored = config.from_dict(config.TrainConfig, config.to_dict(original), where="x")
    assert restored == original


@pytest.mark.parametrize(
    ("written", "read"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), (None, ()), ([], ())],
)
def test_one_store_or_none_may_be_written_without_a_list(
    written: object, read: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"data": {"path": written, "weights": [1, 2.5]}}))
    merged = parse("--config", str(file)).data
    assert merged.path == tuple(map(Path, read)) and merged.weights == (1.0, 2.5)
    assert parse("--config", str(file), "--data.path", "x", "y").data.path == (Path("x"), Path("y"))


def test_command_line_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"steps": 5, "seed": 3, "optim": {"learning_rate": 2e-4, "beta2": 0.95}}))
    merged = parse("--config", str(file), "--seed", "4", "--optim.beta2", "0.99")
    assert (merged.steps, merged.seed, merged.micro_batch) == (5, 4, 1)
    assert (merged.optim.learning_rate, merged.optim.beta2) == (2e-4, 0.99)


def test_flags_of_other_trainers() -> None:
    parsed = parse(
        "--learning-rate", "1e-4", "--gradient_accumulation_steps", "4", "--num_epochs", "2",
        "--save_steps=50", "--output_path", "o", "--local_rank=1", "--max_timestep_boundary", "0.417",
        "--min_timestep_boundary", "0", "--resume-from-checkpoint", "must", "--keep_last", "3",
        "--keep-every", "1000", "--save_minutes", "30", "--init-from", "w", "--allow_changes", "seed", "data",
    )  # fmt: skip
    assert (parsed.optim.learning_rate, parsed.accumulation, parsed.epochs) == (1e-4, 4, 2)
    assert (parsed.checkpoint.save_every, parsed.output, parsed.local_rank) == (50, Path("o"), -1)
    assert (parsed.flow.max_timestep_boundary, parsed.flow.min_timestep_boundary) == (0.417, 0.0)
    saving = parsed.checkpoint
    assert (saving.resume, saving.keep_last, saving.keep_every, saving.save_minutes) == ("must", 3, 1000, 30)
    assert (parsed.model.init_from, saving.allow_changes) == (Path("w"), ("seed", "data"))


@pytest.mark.parametrize("value", ["auto", "must", "none", "runs/my run"])
def test_resume_and_init_from_are_flags_of_their_own(value: str) -> None:
    assert parse("--resume", value).checkpoint.resume == value
    assert parse("--resume", value).model.init_from is None
    assert parse("--init-from", value).checkpoint.resume == "auto"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"stpes": 5}, ("stpes", "did you mean 'steps'")),
        ({"steps": "5"}, ("steps", "'5'", "int")),
        ({"steps": True}, ("steps", "True", "int")),
        ({"optim": {"learning_rate": "x"}}, ("optim: learning_rate", "'x'")),
        ({"optim": 3}, ("optim", "expected an object")),
        ({"precision": "fp16"}, ("precision", "'fp16'", "'bf16'")),
        ([], ("expected an object", "list")),
    ],
)
def test_a_wrong_file_names_file_key_and_what_is_legal(
    tmp_path: Path, content: object, words: tuple[str, ...]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content))
    with pytest.raises(cli.UserError) as caught:
        parse("--config", str(file))
    for word in (str(file), *words):
        assert word in str(caught.value)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(cli.UserError, match=r"nope\.json: No such file"):
        parse("--config", str(tmp_path / "nope.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(cli.UserError, match=r"bad\.json: not JSON"):
        parse("--config", str(tmp_path / "bad.json"))

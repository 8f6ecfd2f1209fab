"""Second derivatives through adapted experts are those of the dense model, or an error says that there are none."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from families import tiny_model
from listed import listed_model
from oracle import config_for, random_tokens


TOKENS = random_tokens(2, 6)
FAMILIES = {
    **{
        name: (lambda name=name: tiny_model(name)) for name in ("olmoe", "gpt_oss", "mixtral", "qwen2_moe", "glm4_moe")
    },
    "listed": listed_model,
}


def gradients(model, embeddings, leaves):
    """The gradient of a gradient penalty in the input, for the input and for some parameters."""
    embeddings = embeddings.clone().requires_grad_()
    loss = model(inputs_embeds=embeddings).logits.pow(2).sum()
    (first,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), [embeddings, *leaves], allow_unused=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_second_derivatives_are_right_or_refused(family, is_trained):
    base = FAMILIES[family]()
    base.set_attn_implementation("eager")
    model = get_peft_model(base, config_for(base, init_weights=False)).eval()
    embeddings = model.get_input_embeddings()(TOKENS).detach()
    model.set_adapter("default", inference_mode=not is_trained)
    leaves = [p for p in model.parameters() if p.requires_grad]
    error = None
    try:
        found = gradients(model, embeddings, leaves)[0]
    except RuntimeError as refusal:
        error = refusal
    if error is not None:
        assert "once_differentiable" in str(error) or "second derivative" in str(error)
        return
    dense = model.merge_and_unload()
    dense.set_experts_implementation("eager")
    dense.requires_grad_(False)
    expected = gradients(dense, embeddings, [])[0]
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()

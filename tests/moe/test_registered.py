"""Fused experts in a class of one's own, without transformers' flags."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_esft import ESFTConfig, find_experts, register_experts, score_experts
from peft_esft.moe.architectures import REGISTERED_LAYOUTS

from checkpoints import randomize
from families import tiny_model


TOKENS = torch.arange(3, 15)[None]


class OwnExperts(nn.Module):
    """The experts of a model of transformers, kept and computed as research code would."""

    def __init__(self, experts, has_gate=True, is_transposed=False):
        super().__init__()
        up = experts.gate_up_proj.detach() if has_gate else experts.gate_up_proj.detach().chunk(2, 1)[0]
        down = experts.down_proj.detach()
        self.own_flags = (has_gate, is_transposed)
        self.act_fn = experts.act_fn
        name = "gate_up_proj" if has_gate else "up_proj"
        setattr(self, name, nn.Parameter(up.transpose(1, 2).contiguous() if is_transposed else up.clone()))
        self.down_proj = nn.Parameter(down.transpose(1, 2).contiguous() if is_transposed else down.clone())

    def forward(self, hidden_states, top_k_index, top_k_weights):
        has_gate, is_transposed = self.own_flags
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
            up = (self.gate_up_proj if has_gate else self.up_proj)[expert]
            down = self.down_proj[expert]
            rows = hidden_states[tokens] @ (up if is_transposed else up.T)
            if has_gate:
                gate, rows = rows.chunk(2, dim=-1)
                rows = self.act_fn(gate) * rows
            else:
                rows = self.act_fn(rows)
            rows = rows @ (down if is_transposed else down.T)
            output = output.index_add(0, tokens, rows * top_k_weights[tokens, places, None])
        return output


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    yield
    REGISTERED_LAYOUTS.clear()


def own_model(experts_class=OwnExperts, **flags):
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = experts_class(layer.mlp.experts, **flags)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("flags", [{}, {"has_gate": False}, {"is_transposed": True}], ids=str)
def test_they_are_found_scored_trained_saved_and_merged(flags, tmp_path):
    class Inherited(OwnExperts):
        pass

    register_experts(OwnExperts, **flags)
    model = own_model(Inherited, **flags)
    base = logits(model)
    containers = find_experts(model)
    assert [container.kind for container in containers.values()] == ["fused"] * len(model.model.layers)
    scores = score_experts(model, [{"input_ids": TOKENS}], progress=False)
    adapted = get_peft_model(model, ESFTConfig.from_scores(scores, top_p=0.3))
    torch.testing.assert_close(logits(adapted), base)
    adapted.train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.abs().sum() > 0 for parameter in trained)
    randomize(adapted.eval())
    expected = logits(adapted)
    assert not torch.allclose(expected, base, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(own_model(**flags), tmp_path).eval()), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


def test_the_error_without_a_description_says_how_to_give_one():
    message = r"If model\.layers\.0\.mlp\.experts \(OwnExperts\) holds .*register_experts\(type\(module\), has_gate"
    with pytest.raises(ValueError, match=message):
        get_peft_model(own_model(), ESFTConfig(target_experts={0: [1]}))
    with pytest.raises(ValueError, match=f"the model cannot be scored: .*{message}"):
        score_experts(own_model(), [{"input_ids": TOKENS}])
    with pytest.raises(ValueError, match=r"^Linear has no experts module of a known kind\. ESFT needs"):
        get_peft_model(nn.Linear(2, 2), ESFTConfig(target_experts={0: [1]}))


@pytest.mark.parametrize(
    ("flags", "lacking"),
    [
        ({"has_gate": False}, r"lacks up_proj\."),
        ({"has_bias": True}, r"lacks gate_up_proj_bias, down_proj_bias\."),
        ({"has_post_expert_norm": True}, r"lacks post_expert_norm\."),
    ],
)
def test_what_a_description_does_not_fit_is_refused(flags, lacking):
    register_experts(OwnExperts, **flags)
    with pytest.raises(ValueError, match=f"OwnExperts was registered with .*, but {lacking}"):
        find_experts(own_model())


def test_what_is_no_class_is_refused():
    for thing in (own_model().model.layers[0].mlp.experts, dict, "OwnExperts"):
        with pytest.raises(ValueError, match="expected the class of the module"):
            register_experts(thing)

"""Attaching an adapter to a model that adds the router's balancing loss says what that costs."""

from __future__ import annotations

import warnings

import pytest
from peft import PeftModel, get_peft_model

from families import tiny_model
from oracle import config_for


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_the_balancing_loss_is_warned_of_once(family, tmp_path):
    base = tiny_model(family)
    base.config.output_router_logits, base.config.router_aux_loss_coef = True, 0.9
    with pytest.warns(UserWarning, match=r"adds 0\.9 times the router's balancing loss") as said:
        model = get_peft_model(base, config_for(base))
    assert sum("balancing loss" in str(warning.message) for warning in said) == 1
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Already found a `peft_config`|.*is_gradient_checkpointing")
        PeftModel.from_pretrained(model.unload(), tmp_path)  # for inference no loss is computed


@pytest.mark.parametrize(("is_on", "coefficient"), [(False, 0.9), (True, 0.0)])
def test_a_model_without_that_loss_is_not(is_on, coefficient):
    base = tiny_model("olmoe")
    base.config.output_router_logits, base.config.router_aux_loss_coef = is_on, coefficient
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        get_peft_model(base, config_for(base))

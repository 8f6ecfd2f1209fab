"""Preferences with TRL's `DPOTrainer`: the reference is the same model with the adapter disabled, so no second copy.

python examples/dpo.py
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer


sys.path.insert(0, str(Path(__file__).parent / "tiny_moe"))

from peft_esft import ESFTConfig, score_experts

from tasks import batches, load_base, load_task


TASK = "sections"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/dpo"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    set_seed(0)
    base, tokenizer = load_base()
    examples, held_out = load_task(TASK, "train"), load_task(TASK, "eval")[:32]
    scores = score_experts(base, batches(examples, tokenizer), max_tokens=16_384, progress=False)
    trainer = DPOTrainer(
        base,
        args=DPOConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            router_aux_loss_coef=0.0,  # TRL's default is the model's balancing loss, which works against the task
            learning_rate=2e-3,
            beta=1.0,
            gradient_checkpointing=False,
            max_length=192,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=preferences(examples),
        eval_dataset=preferences(held_out),
        processing_class=tokenizer,
        peft_config=ESFTConfig.from_scores(scores, top_p=0.2, task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.train()
    after = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.save_model()
    size = (options.output / "adapter_model.safetensors").stat().st_size
    print(f"right answer preferred: {before:.0%} before, {after:.0%} after; adapter of {size / 1e6:.2f} MB")
    if not after > max(before, 0.6):
        sys.exit("training did not teach the preference")


def preferences(examples: list[tuple[str, str]]) -> Dataset:
    """The right answer is preferred to a wrong one, drawn from the other examples' answers."""
    answers = sorted({answer for _, answer in examples})
    draw = random.Random(0)
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": answer, "rejected": draw.choice([a for a in answers if a != answer])}
            for prompt, answer in examples
        ]
    )


if __name__ == "__main__":
    main()

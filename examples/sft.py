"""An adapter of the embedded model with TRL's `SFTTrainer`: `peft_config=ESFTConfig(...)` is all that is new.

python examples/sft.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer


sys.path.insert(0, str(Path(__file__).parent / "tiny_moe"))

from peft_esft import ESFTConfig, score_experts

from tasks import batches, load_base, load_task


TASK = "verses"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/sft"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    set_seed(0)
    base, tokenizer = load_base()
    examples, held_out = load_task(TASK, "train"), load_task(TASK, "eval")[:64]
    scores = score_experts(base, batches(examples, tokenizer), max_tokens=16_384, progress=False)
    trainer = SFTTrainer(
        base,
        SFTConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            router_aux_loss_coef=0.0,  # TRL's default is the model's balancing loss, which works against the task
            learning_rate=1e-3,
            max_length=192,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=as_dataset(examples),
        eval_dataset=as_dataset(held_out),
        processing_class=tokenizer,
        peft_config=ESFTConfig.from_scores(scores, top_p=0.2, task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    size = (options.output / "adapter_model.safetensors").stat().st_size
    print(f"loss on held-out examples: {before:.3f} before, {after:.3f} after; adapter of {size / 1e6:.2f} MB")
    if not after < before:
        sys.exit("training did not lower the loss")


def as_dataset(examples: list[tuple[str, str]]) -> Dataset:
    """Rows as TRL takes them; the loss is that of the completion."""
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in examples])


if __name__ == "__main__":
    main()

"""An adapter of the embedded model with transformers' `Trainer`: score, train, evaluate, save, resume.

    python examples/trainer.py                                                  # one process
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/trainer.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/trainer.py
    python examples/trainer.py --resume                                         # goes on from the last checkpoint

The same script runs under every engine: the engine is named in the configuration file alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from accelerate import PartialState
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed


sys.path.insert(0, str(Path(__file__).parent / "tiny_moe"))

from peft_esft import ESFTConfig, score_experts
from peft_esft.checkpoints import last_complete_checkpoint

from tasks import batches, load_base, load_task, make_batch


TASK = "sections"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/trainer"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --output")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    options = parser.parse_args()

    set_seed(0)
    base, tokenizer = load_base()
    examples, held_out = load_task(TASK, "train"), load_task(TASK, "eval")[:64]
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=1e-3,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=options.steps // 2,
        save_steps=options.steps // 2,
        load_best_model_at_end=True,
        gradient_checkpointing=options.checkpointing,
        logging_steps=10,
        remove_unused_columns=False,  # a row is a pair of texts
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    # Each process scores its part of the data; the counts are summed.
    state = PartialState()
    scores = score_experts(
        base,
        batches(examples[state.process_index :: state.num_processes], tokenizer),
        max_tokens=16_384,
        progress=False,
    )
    model = get_peft_model(base, ESFTConfig.from_scores(scores, top_p=0.2, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        data_collator=lambda rows: make_batch(rows, tokenizer),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(options.output) if options.resume else None)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(options.output / "adapter"))
    if state.is_main_process:
        size = (options.output / "adapter" / "adapter_model.safetensors").stat().st_size
        print(f"loss on held-out examples: {before:.3f} before, {after:.3f} after; adapter of {size / 1e6:.2f} MB")
    state.destroy_process_group()
    if not after < before:
        sys.exit("training did not lower the loss")


if __name__ == "__main__":
    main()

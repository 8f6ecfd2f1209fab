# %% [markdown]
# # A tour: from scoring to switching
#
# This tour trains two adapters, one for each of two tasks, over one frozen mixture-of-experts model of 11 M
# parameters. It finds the experts that each task uses, trains them, saves them, and serves both tasks from one base
# model. It needs a clone of the repository and matplotlib, and no network. It takes a minute on a CPU.
#
# `examples/tour.ipynb` is the notebook, `examples/tour.py` the same as a script.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import PeftModel, get_peft_model

from peft_esft import ESFTConfig, score_experts


EXAMPLES = Path("examples") if Path("examples").is_dir() else Path()
sys.path.insert(0, str(EXAMPLES / "tiny_moe"))

import tasks


torch.manual_seed(0)
base, tokenizer = tasks.load_base()
TASKS = {"verses": "a Bible verse to its book", "sections": "a paragraph of a Russian manual page to its heading"}
for task, what in TASKS.items():
    (prompt, answer), *_ = tasks.load_task(task, "train")
    print(f"{task}: {what}\n    {prompt[:88]!r} ... -> {answer!r}")

# %% [markdown]
# ## 1. Which experts does each task use?
#
# `score_experts` runs forward passes over the training data and counts which of the 64 experts of each layer the
# routers choose. `from_scores` then takes the most used experts of each layer until they have 20 % of the choices.

# %%
scores, configs = {}, {}
for task in TASKS:
    batches = tasks.batches(tasks.load_task(task, "train"), tokenizer)
    scores[task] = score_experts(base, batches, max_tokens=16_384, progress=False)
    configs[task] = ESFTConfig.from_scores(scores[task], top_p=0.2, task_type="CAUSAL_LM")

for path in configs["verses"].target_experts:
    print(path, {task: config.target_experts[path] for task, config in configs.items()})

# %% [markdown]
# Bright experts are used often. Dots mark the experts that will be trained; each task has its own.

# %%
figure, panels = plt.subplots(len(TASKS), 1, figsize=(9, 3.4), sharex=True, layout="constrained")
for axes, task in zip(panels, TASKS, strict=True):
    axes.imshow(torch.stack(list(scores[task].token().values())).numpy(), aspect="auto", vmin=0, vmax=0.1)
    for layer, ids in enumerate(configs[task].target_experts.values()):
        axes.scatter(ids, [layer] * len(ids), s=14, color="white", edgecolors="black")
    axes.set(title=task, ylabel="layer")
axes.set_xlabel("expert")
Path("tour_output").mkdir(exist_ok=True)
figure.savefig("tour_output/experts.png")

# %% [markdown]
# ## 2. Train them
#
# `get_peft_model` is PEFT's function. It adds trainable fp32 deltas to the selected experts; the base is only read.
# Here a plain loop trains them. `Trainer` and TRL work as well.


# %%
def train(model, task, steps=60):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    examples = tasks.load_task(task, "train")
    for _, batch in zip(range(steps), tasks.batches(examples, tokenizer, seed=0), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


before = {name: weight.clone() for name, weight in base.state_dict().items()}
for task, config in configs.items():
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    train(model, task)
    model.save_pretrained(f"tour_output/{task}")
    base = model.unload()  # the same base again, for the next task

for task in TASKS:
    size = Path(f"tour_output/{task}/adapter_model.safetensors").stat().st_size
    print(f"{task}: {size / 1e6:.1f} MB; the base has {4 * base.num_parameters() / 1e6:.1f} MB")
print("base untouched:", all(torch.equal(before[name], weight) for name, weight in base.state_dict().items()))

# %% [markdown]
# ## 3. Both adapters on one base
#
# `set_adapter` switches between adapters. It moves no weights.

# %%
model = PeftModel.from_pretrained(base, "tour_output/verses", adapter_name="verses").eval()
model.load_adapter("tour_output/sections", adapter_name="sections")


def exact(task):
    return 100 * tasks.evaluate(model, tokenizer, tasks.load_task(task, "eval")[:100])["exact"]


results = {}
with model.disable_adapter():
    results["base"] = {task: exact(task) for task in TASKS}
for adapter in TASKS:
    model.set_adapter(adapter)
    results[adapter] = {task: exact(task) for task in TASKS}

print("answers that are exactly right (%)")
for adapter, found in results.items():
    print(f"  {adapter:9}", *(f"{task} {value:5.1f}" for task, value in found.items()))

# %% [markdown]
# ## 4. Both tasks in one batch
#
# `adapter_names` gives each sample its own adapter. `"__base__"` means no adapter.

# %%
questions = [tasks.load_task(task, "eval")[0] for task in ("verses", "sections", "verses")]
names = ["verses", "sections", "__base__"]
batch = tokenizer([prompt for prompt, _ in questions], return_tensors="pt", padding=True)
tokens = model.generate(**batch, adapter_names=names, max_new_tokens=10, do_sample=False)
for name, (_, expected), answer in zip(names, questions, tokens[:, batch["input_ids"].shape[1] :], strict=True):
    print(f"{name:9} {tokenizer.decode(answer, skip_special_tokens=True)!r}, expected {expected!r}")

# %% [markdown]
# ## 5. An ordinary model again
#
# Merging writes the trained weights into the base; unmerging restores it bit for bit. `merge_and_unload` returns an
# ordinary model, for programs that do not know adapters.

# %%
model.set_adapter("verses")
unmerged = exact("verses")
merged = model.merge_and_unload()
merged_exact = 100 * tasks.evaluate(merged, tokenizer, tasks.load_task("verses", "eval")[:100])["exact"]
print(f"{type(merged).__name__}: {merged_exact:.1f} %, unmerged {unmerged:.1f} %")

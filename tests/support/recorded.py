"""A plain record of every token's routing, to compare the streaming scores with."""

from __future__ import annotations

from peft_esft import find_experts


class RecordedRouting:
    """Every call of every container, token by token, in plain Python."""

    def __init__(self, model):
        self.calls = {path: [] for path in find_experts(model)}
        for path, container in find_experts(model).items():
            container.wrapper_or_module.register_forward_pre_hook(
                lambda module, args, path=path: self.calls[path].append((args[1].tolist(), args[2].double().tolist()))
            )

    def scores(self, masks, num_experts, paths=None):
        """Token and gate scores, mean over samples and flat, from the attention masks of the batches."""
        result = {}
        for path in self.calls if paths is None else paths:
            calls = self.calls[path]
            samples = []
            for (index, gates), mask in zip(calls, masks, strict=True):
                length = mask.shape[1]
                for sample, row in enumerate(mask.tolist()):
                    tokens = [sample * length + place for place, counts in enumerate(row) if counts]
                    samples.append([(index[token], gates[token]) for token in tokens])
            samples = [sample for sample in samples if sample]
            token, gate = ([[0.0] * num_experts for _ in samples] for _ in range(2))
            for number, sample in enumerate(samples):
                for experts, weights in sample:
                    for expert, weight in zip(experts, weights, strict=True):
                        if expert < num_experts and weight > 0:
                            token[number][expert] += 1 / len(experts)
                            gate[number][expert] += weight
            lengths = [len(sample) for sample in samples]
            result[path] = {}
            for metric, sums in (("token", token), ("gate", gate)):
                shares = [[v / length for v in row] for row, length in zip(sums, lengths, strict=True)]
                result[path][metric, "sample"] = [sum(column) / len(samples) for column in zip(*shares, strict=True)]
                result[path][metric, "token"] = [sum(column) / sum(lengths) for column in zip(*sums, strict=True)]
        return result

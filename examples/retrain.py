"""Prune a model to 2:4, rebuild its blocks, retrain a sliver of it with the dense model's help, evaluate and save; maybe push.

python examples/retrain.py HuggingFaceTB/SmolLM2-135M-Instruct texts.jsonl out --steps 200 --push-to you/smollm2-2-4
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_prune


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("texts", help="a .txt, .jsonl or .parquet file; its last sequences evaluate")
parser.add_argument("output")
parser.add_argument("--gguf-file")
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--push-to")
args = parser.parse_args()

dense, model = (AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf_file, dtype="float32") for _ in range(2))
tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file)
sequences = hf_prune.calibration_sequences(args.texts, tokenizer, n_samples=args.samples, sequence_length=args.length, seed=0)
held_out = max(1, args.samples // 10)
train, evaluation = sequences[:-held_out], sequences[-held_out:]


def measured(when: str) -> hf_prune.Perplexity:
    result = hf_prune.perplexity(model, None, torch.stack(evaluation), sequence_length=args.length)
    print(f"{when}: perplexity {result.perplexity:.2f} on {result.tokens} tokens held out")
    return result


before = measured("dense")
config = hf_prune.PruningConfig(method="sparsegpt", pattern="2:4", n_samples=len(train), sequence_length=args.length)
print(model.prune(config, train, reconstruct=True))
measured("pruned and rebuilt")

trainer = Trainer(
    model,
    TrainingArguments(
        args.output + "-run", max_steps=args.steps, per_device_train_batch_size=2, learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10, weight_decay=0.0, save_strategy="no", report_to=[],
    ),
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in train],
    callbacks=[hf_prune.PERPCallback(("mask_lora", "norm"), distillation=hf_prune.Distillation(dense))],
)  # fmt: skip
trainer.train()
model.pruning_report.add_perplexity("calibration text, held out", measured("retrained"), before)
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
if args.push_to:
    model.push_to_hub(args.push_to)

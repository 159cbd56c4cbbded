"""The command `hf-prune`: prune, perplexity, inspect, expand, export, advise. Arguments in, one call of the library, text out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from .atomic import check_writable
from .config import PruningConfig
from .patterns import first_line, one_of
from .pruning import check_device
from .ranks import Ranks


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 if all went well, 2 with a message on stderr if the user's input was wrong, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        _check_machine(args)
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        words = str(error)
        if hasattr(args, "trust_remote_code"):
            words = words.replace("the argument `trust_remote_code=True`", "--trust-remote-code")
        print(f"hf-prune {args.command}: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-prune {args.command}: interrupted; {_left(args)}.", file=sys.stderr)
        return 130


def _left(args) -> str:
    from .streaming import work_of

    if args.command == "prune" and Path(args.resume_dir or work_of(Path(args.output).resolve()), "journal.json").exists():
        return "the same command goes on from its journal"
    return getattr(args, "left", "nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-prune", description="Prune language models of Hugging Face Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)

    prune = commands.add_parser("prune", help="prune a model and save it with its masks")
    prune.add_argument("model", help="folder or Hub name")
    prune.add_argument("output", help="folder to write")
    prune.add_argument("--method", default="wanda")
    prune.add_argument("--pattern", default="unstructured", help="'unstructured' or N:M that keeps N of M, such as 2:4")
    prune.add_argument("--sparsity", type=float, default=0.5, help="for pattern 'unstructured'")
    prune.add_argument("--calibration", help=".txt, .jsonl or .parquet file, or a Hub data set")
    prune.add_argument("--n-samples", type=int, default=128)
    prune.add_argument("--sequence-length", type=int)
    prune.add_argument("--include", nargs="*", default=["*"], metavar="GLOB")
    prune.add_argument("--exclude", nargs="*", default=[], metavar="GLOB")
    prune.add_argument("--override", action="append", default=[], metavar="GLOB=PATTERN")
    prune.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the method, as JSON")
    prune.add_argument("--propagate", choices=("linear", "block"))
    prune.add_argument("--comparison-group", choices=("row", "matrix", "block", "model"))
    prune.add_argument("--sampling", choices=("packed", "paper"), default="packed")
    prune.add_argument("--seed", type=int, default=0)
    prune.add_argument("--compact", action="store_true", help="save only what the masks keep; hf_prune.load reads it")
    prune.add_argument("--resume-dir", help="folder for a journal; the same command goes on from it after an interruption")
    prune.add_argument("--bf16", action="store_true", help="calibrate a float32 model under bfloat16 autocast: faster")
    prune.add_argument("--stream", action="store_true", help="from disk to disk, one block in memory; goes on when run again")
    prune.set_defaults(run=_prune)

    perplexity = commands.add_parser("perplexity", help="measure the perplexity of a text file")
    perplexity.add_argument("model", help="folder or Hub name")
    perplexity.add_argument("text", help="text file")
    perplexity.add_argument("--sequence-length", type=int)
    perplexity.add_argument("--stride", type=int)
    perplexity.set_defaults(run=_perplexity)

    inspect = commands.add_parser("inspect", help="tell what is in a folder: masks, sparsity, whether zeros and masks agree")
    inspect.add_argument("folder")
    inspect.set_defaults(run=_inspect)

    expand = commands.add_parser("expand", help="write the ordinary form of a compact folder")
    expand.add_argument("folder")
    expand.add_argument("output", help="folder to write")
    expand.set_defaults(run=_expand)

    export = commands.add_parser("export", help="write a model for ONNX Runtime or OpenVINO and check its zeros there")
    export.add_argument("model", help="folder or Hub name")
    export.add_argument("output", help="folder to write")
    export.add_argument("--format", choices=("onnx", "openvino"), default="onnx")
    export.add_argument("--weights", choices=("int8", "int4"), help="quantise the weights symmetrically")
    export.add_argument("--pattern", help="refuse a model that is not pruned so throughout, such as 2:4")
    export.set_defaults(run=_export)

    advise = commands.add_parser("advise", help="tell what pruning would gain on this machine: speed, sizes, a recommendation")
    advise.add_argument("model", help="folder or Hub name; only its config is read")
    advise.add_argument("--json", action="store_true", help="print JSON")
    advise.set_defaults(run=_advise)

    for command in (prune, perplexity, advise):
        command.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; default: as saved")
        command.add_argument("--device", default=None if command is advise else "cpu")
        command.add_argument("--gguf-file", help="name of a GGUF file in the folder")
    for command in (prune, perplexity, inspect, advise):
        command.add_argument("--trust-remote-code", action="store_true", help="run the Python code that comes with the model")
    return parser


def _check_machine(args) -> None:
    """Raises ValueError for a --device that is not here, or a --dtype that is none; `advise` says for itself what it takes."""
    if args.command not in ("prune", "perplexity"):
        return
    one_of("--dtype", args.dtype, ("auto", "bfloat16", "float16", "float32"))
    check_device(args.device, "--device")


def _load(args, needs_text: bool = True):
    from transformers import AutoTokenizer

    from .serialization import check_causal, config_of, load

    how = {"trust_remote_code": args.trust_remote_code}
    if args.gguf_file:
        how["gguf_file"] = args.gguf_file
    else:
        check_causal(config_of(args.model, **how), args.model)
    model = load(args.model, dtype=args.dtype, **how)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **how)
    except Exception as error:  # each version of Transformers has its own
        if needs_text:
            raise
        tokenizer = None
        print(f"no tokenizer is saved, it has none: {first_line(error)}", file=sys.stderr)
    return model.to(args.device), tokenizer


def _pairs(words: list[str], option: str) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"{option} needs NAME=VALUE, got {word!r}.")
    return dict(word.split("=", 1) for word in words)


def value_of(text: str):
    """JSON, or True, False and None as Python spells them, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _prune(args) -> int:
    words = {f.name: getattr(args, f.name) for f in dataclasses.fields(PruningConfig) if hasattr(args, f.name)}
    options = {name: value_of(text) for name, text in _pairs(args.option, "--option").items()}
    config = PruningConfig(**words, method_options=options, overrides=_pairs(args.override, "--override"))
    if config.needs_calibration and not args.calibration:
        raise ValueError(f"method {config.method.name!r} needs --calibration; 'magnitude' needs none.")
    if args.compact and config.method.structural:
        raise ValueError(f"--compact leaves out zeros, and '{config.pattern}' leaves none: the model is smaller as it is.")
    check_writable(args.output)
    if args.stream:
        return _stream(args, config)
    model, tokenizer = _load(args, config.needs_calibration)
    report = model.prune(config, args.calibration, tokenizer, resume_dir=args.resume_dir, bf16=args.bf16)
    if Ranks.launched().index == 0:
        print(report)
        model.save_pretrained(args.output, compact=args.compact)
        if tokenizer is not None:
            args.left = f"{args.output} has the model, but not its tokenizer"
            try:
                tokenizer.save_pretrained(args.output)
            except Exception as error:  # tokenizers has no other for a full disk
                raise OSError(f"{args.left}: {error}") from error
        if model.config.get_text_config() is not model.config:
            args.left = f"{args.output} has the model, but not its processor"
            _copy_processor(args)
        print(f"saved to {args.output}")
    return 0


def _copy_processor(args) -> None:
    """What a model that sees or hears has beside its tokenizer, as it is."""
    from .serialization import file_of

    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"):
        if path := file_of(args.model, name):
            shutil.copyfile(path, Path(args.output, name))


def _stream(args, config: PruningConfig) -> int:
    from transformers import AutoTokenizer

    from .streaming import prune_checkpoint

    given = {
        "--compact": args.compact,
        "--resume-dir": args.resume_dir,
        "--gguf-file": args.gguf_file,
        "--dtype": args.dtype != "auto",
    }
    if wrong := [option for option, value in given.items() if value]:
        raise ValueError(
            f"--stream writes weights as they are in safetensors, and goes on by itself: leave out {', '.join(wrong)}."
        )
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **trust) if config.needs_calibration else None
    how = {"device": args.device, "bf16": args.bf16, **trust}
    report = prune_checkpoint(args.model, args.output, config, args.calibration, tokenizer, **how)
    if Ranks.launched().index == 0:
        print(f"{report}\nsaved to {args.output}")
    return 0


def _perplexity(args) -> int:
    from .evaluation import perplexity

    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text} is not text in UTF-8: {error}.") from error
    print(perplexity(*_load(args), text, sequence_length=args.sequence_length, stride=args.stride, progress=True))
    return 0


def _expand(args) -> int:
    from .conversion import expand

    expand(args.folder, args.output)
    print(f"saved to {args.output}")
    return 0


def _export(args) -> int:
    from .runtimes.exporting import export

    print(export(args.model, args.output, format=args.format, weights=args.weights, pattern=args.pattern))
    print(f"saved to {args.output}")
    return 0


def _advise(args) -> int:
    from .runtimes.advise import advise

    how = {"gguf_file": args.gguf_file, "trust_remote_code": args.trust_remote_code}
    advice = advise(args.model, args.device, dtype=args.dtype, **how)
    print(json.dumps(advice.to_dict(), indent=2) if args.json else advice)
    return 0


def _inspect(args) -> int:
    from .serialization import PruningState, class_of, config_of, load

    state = PruningState.load(args.folder)
    print(f"{args.folder}: {state.config['method']}, {state.config['pattern']}")
    masks = state.masks
    for name in masks:
        print(f"  {name}  {tuple(masks.shape(name))}  sparsity {1 - masks.kept(name) / masks[name].numel():.4f}")
    print(f"{len(masks)} masks, sparsity {masks.sparsity():.4f} of {masks.numel()} weights")
    if state.report:
        print(f"{state.report.model_sparsity:.4f} of all parameters, calibrated on {state.report.tokens} tokens")
    trust = {"trust_remote_code": args.trust_remote_code}
    read = load if state.compact else class_of(config_of(args.folder, **trust)).from_pretrained
    model = read(args.folder, dtype="auto", **trust)
    violations = masks.violations(model)
    for name, count in violations.items():
        print(f"{name}: {count} pruned weights are not zero")
    print("zeros and masks DISAGREE" if violations else "zeros and masks agree")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

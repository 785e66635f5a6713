"""Run the whole method on the demo data: relevance, prune, distil, fine-tune, evaluate; 9 minutes on two cores.

make demo, or: python launch/demo.py [--run runs/demo] [--steps 150]
"""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

from ejmp.compress.config import parse_terms
from ejmp.compress.pruning import prune
from ejmp.config_file import Parser
from ejmp.measure import report
from ejmp.model.checkpoint import load
from ejmp.model.jmp import JMP
from ejmp.provenance import provenance
from ejmp.train import presets
from ejmp.train.demo import demo_config, demo_teacher
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import Errors, evaluate, forces_only, table
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Result, Run, train
from ejmp.train.objective import Distillation, Supervised
from ejmp.train.sources import demo_downstream, demo_mix, tasks_of, with_tasks_of
from ejmp.train.start import for_finetuning, new_model
from ejmp.train.survey import survey

BLOCKS = (5, 4, 3, 2)
FINETUNE_STEPS = 60


def say(text: str) -> None:
    """Write to standard output."""
    sys.stdout.write(f"{text}\n\n")
    sys.stdout.flush()


def distilled(teacher: JMP, path: Path, blocks: int, steps: int, folder: Path, ranks: Ranks) -> tuple[Errors, Errors]:
    """Return the errors of the first blocks of a teacher, before and after distillation."""
    sources = with_tasks_of(path, demo_mix(), teacher)
    config = dataclasses.replace(presets.demo("distill"), steps=steps, validate_every=steps)
    objective = Distillation(prune(teacher, blocks=blocks), teacher, tasks_of(sources), parse_terms(presets.DEMO_TERMS))
    result = finished(Run(objective=objective, sources=sources, config=config, directory=folder, ranks=ranks))
    return result.before, result.after


def finished(run: Run) -> Result:
    """Train and return the result; end the demo if it was told to stop."""
    result = train(run)
    if not result.finished:
        raise SystemExit(0)
    return result


def finetuned(start: JMP, folder: Path, ranks: Ranks, *, scratch: bool) -> Errors:
    """Return the errors on the test split of demo aspirin after fine-tuning on gradient forces."""
    source = demo_downstream("rmd17")
    model = for_finetuning(start)
    model = new_model(model.config, [source], seed=0) if scratch else model
    config = dataclasses.replace(presets.demo("finetune"), steps=FINETUNE_STEPS, warmup_steps=10)
    objective = Supervised(model, tasks_of([source]))
    finished(Run(objective=objective, sources=[source], config=config, directory=folder, ranks=ranks))
    return evaluate(load(folder / FINAL), [source], ranks, split="test")


def main() -> None:
    """Run all parts of the demo and print their tables."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=150, help="steps of each distillation (default: 150)")
    parser.take_config()
    options = parser.parse_args()
    start = time.time()
    shutil.rmtree(options.run, ignore_errors=True)
    options.run.mkdir(parents=True)
    with session("auto") as ranks:
        machine = provenance(ranks.device)
        say("1. The teacher: six small blocks, pre-trained on the demo mix (kept for the next time).")
        path = demo_teacher(ranks)
        teacher = load(path)
        sources = with_tasks_of(path, demo_mix(), teacher)
        say("2. How much each block matters (Grad-CAM), % of each branch:")
        say(report.relevance_table(survey(teacher, sources, labels=True)))
        say(f"3. Blocks removed (BR), and distilled for {options.steps} steps (BR+KD).")
        untrained = new_model(demo_config(), sources, seed=1)
        rows = {
            "untrained": evaluate(untrained, sources, ranks),
            "teacher, 6 blocks": evaluate(teacher, sources, ranks),
        }
        for blocks in BLOCKS:
            folder = options.run / f"blocks{blocks}"
            rows[f"{blocks} blocks, BR"], rows[f"{blocks} blocks, BR+KD"] = distilled(
                teacher, path, blocks, options.steps, folder, ranks
            )
        say(f"4. Four blocks fine-tuned on gradient forces of aspirin for {FINETUNE_STEPS} steps, and from scratch.")
        student = load(options.run / "blocks4" / FINAL)
        fine = {
            "distilled": finetuned(student, options.run / "finetune", ranks, scratch=False),
            "from scratch": finetuned(student, options.run / "scratch", ranks, scratch=True),
        }
    say("Test errors of aspirin:\n\n" + table(fine))
    say("Validation errors of forces:\n\n" + table({name: forces_only(errors) for name, errors in rows.items()}))
    result = {
        "errors": rows,
        "finetune": fine,
        "seconds": time.time() - start,
        "steps": options.steps,
        "machine": machine,
    }
    (options.run / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"{options.run / 'demo.json'}, {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

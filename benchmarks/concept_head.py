"""Does learning the concepts help the captions, where training images are few?

    OMP_NUM_THREADS=1 python benchmarks/concept_head.py outputs/concept_head [--seeds 42 43 44]

For 500 and 2,000 training images and each seed it trains the quickstart's model without and with the concept head, in
the same number of steps. Both caption the 400 test images and 2,000 fresh images of the same combinations of
attributes. Differences are with the head from without, of the same seed. Their 95 % intervals are the bootstrap's over
the captions of all seeds; how much the training matters is to be seen in the differences of the single seeds.

Of concepts, the F1 of ImageCLEF on the 400 test images is that of `scores.json`.

What a folder holds is not computed again. About half an hour on one core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from higher_scores import FRESH, caption, measure, run

from captioning.data.phantoms import load_phantoms
from captioning.scoring.bootstrap import Score, compare, resampling_counts


STEPS = {500: 320, 2000: 640}  # by number of training images
VALIDATED = 4  # times in a training
# By what each is called: recipe, flags
SYSTEMS = {
    "without head": ("quickstart", ()),
    "with head, auto": ("quickstart_concepts", ()),
    "with head, weight .1": ("quickstart_concepts", ("--concept_loss_weight", "0.1")),
}
PREDICTORS = ("head", "neighbors", "captions", "frequent")


def main(folder: Path, seeds: list[int]) -> None:
    data = {"test": load_phantoms(0)["test"], "fresh": load_phantoms(1, FRESH)["test"]}
    scores, concepts = {}, {}
    for number, steps in STEPS.items():
        for seed in seeds:
            for system, (recipe, flags) in SYSTEMS.items():
                run_folder = folder / f"{number}-{seed}" / system
                flags = ["--seed", str(seed), "--max_train_samples", str(number), *schedule(steps), *flags]
                run(run_folder, recipe, *flags)
                file = run_folder / "captions.json"
                if not file.exists():
                    runs = run_folder.parent
                    found = {name: caption(runs, system, system, True, rows) for name, rows in data.items()}
                    file.write_text(json.dumps(found))
                found = json.loads(file.read_text())
                for name, rows in data.items():
                    scores[number, seed, system, name] = measure(found[name], list(rows["caption"]))
                detected = json.loads((run_folder / "scores.json").read_text())["test"]["concept_detection"]
                concepts[number, seed, system] = detected["systems"]
    print("On the 2,000 fresh images:\n")
    print_captions({run[:3]: found for run, found in scores.items() if run[3] == "fresh"}, seeds, list(SYSTEMS))
    of_test = {run[:3]: found for run, found in scores.items() if run[3] == "test"}
    print("\nOn the 400 test images:\n")
    print_captions(of_test, seeds, list(SYSTEMS))
    print_concepts(concepts, seeds)


def schedule(steps: int) -> list[str]:
    """Return the flags of a training of so many steps."""
    often = str(steps // VALIDATED)
    flags = {"max_steps": str(steps), "eval_strategy": "steps", "eval_steps": often}
    flags |= {"save_strategy": "steps", "save_steps": often}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def print_captions(scores: dict, seeds: list[int], systems: Sequence[str]) -> None:
    """Print the scores of `measure` by number of training images, seed and system; the first is compared with."""
    print("| training images | | ROUGE-L | difference | of each seed | attributes | of each seed |")
    print("|---|---|---|---|---|---|---|")
    for number in STEPS:
        for system in systems:

            def of(score: str, system: str, number: int = number) -> np.ndarray:
                """Return the scores of all captions of all seeds."""
                return np.concatenate([scores[number, seed, system][score] for seed in seeds])

            own, start = of("rougeL", system), of("rougeL", systems[0])
            found = compare(Score.of(own), Score.of(start), resampling_counts(len(own)))
            cells = [f"{own.mean():.3f}", f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"]
            cells += [", ".join(f"{value:+.3f}" for value in (own - start).reshape(len(seeds), -1).mean(axis=1))]
            attributes = of("attributes", system)
            cells += [f"{attributes.mean():.3f}", ", ".join(f"{value:.3f}" for value in attributes)]
            print(f"| {number:,} | {system} | {' | '.join(cells)} |")


def print_concepts(concepts: dict, seeds: list[int]) -> None:
    print(f"\n| training images | | {' | '.join(PREDICTORS)} |")
    print(f"|---|---|{'---|' * len(PREDICTORS)}")
    for number in STEPS:
        for system in SYSTEMS:
            cells = []
            for key in PREDICTORS:
                found = [concepts[number, seed, system].get(key) for seed in seeds]
                values = [one["concept_detection_f1"]["value"] for one in found if one]
                cells.append(", ".join(f"{value:.3f}" for value in values) or "-")
            print(f"| {number:,} | {system} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    main(arguments.folder, arguments.seeds)

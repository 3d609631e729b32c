"""`python -m utils.migrate RECIPE`: translate a recipe of LLaMA-Factory, axolotl or ms-swift for llm_sft.py."""

from __future__ import annotations

if __name__ == '__main__':
    from utils.base.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.base.errors import ConfigError
from utils.base.logger import replace_unprintable
from utils.migrate import axolotl, llama_factory, swift
from utils.migrate.recipe import Recipe, read_recipe
from utils.migrate.report import find_problems, render
from utils.migrate.translation import Translation


def translated(recipe: Recipe, dataset_info: Path | None) -> Translation:
    """Return the translation of a recipe: flags, notes and problems.

    `dataset_info` is used only for LLaMA-Factory. Raises ConfigError if it cannot be read.
    """
    t = Translation(toolkit=recipe.toolkit, values=recipe.values, environment=recipe.environment)
    if recipe.toolkit == 'axolotl':
        axolotl.translate(t)
    elif recipe.toolkit == 'LLaMA-Factory':
        llama_factory.translate(t, recipe.folder, dataset_info)
    else:
        swift.translate(t)
    return t


def main(argv: Sequence[str]) -> int:
    """Print the command for llm_sft.py, and how the keys of the recipe were translated.

    Returns the exit code: 0 on success, 1 if the command has a problem, and 2 if the recipe cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog='python -m utils.migrate',
        description='Translate a recipe of LLaMA-Factory, axolotl or ms-swift into a command for llm_sft.py. Nothing '
        'is trained or downloaded.',
    )
    parser.add_argument('recipe', help='YAML file, file with a command line, or the command line itself in quotes')
    parser.add_argument(
        '--dataset_info', type=Path, help="LLaMA-Factory's dataset_info.json (default: in the folder of its data)"
    )
    words = parser.parse_args(argv)
    try:
        t = translated(read_recipe(words.recipe), words.dataset_info)
    except ConfigError as error:
        for problem in error.problems:
            print(f'error: {problem}', file=sys.stderr)
        return 2

    problems = find_problems(t)
    print(render(t, problems))
    return 1 if problems else 0


if __name__ == '__main__':
    replace_unprintable()
    sys.exit(main(sys.argv[1:]))

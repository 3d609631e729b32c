"""The registries that users edit, and rooms for everything else; docs/architecture.md says what lies where."""

from pathlib import Path

# `python -m utils.push`, say, is found there: commands of earlier versions, which answer with their new name.
__path__ = [*__path__, str(Path(__file__).parent / 'old_commands')]

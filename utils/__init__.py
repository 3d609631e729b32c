"""The registries that users edit, and rooms (folders) for all other code. docs/architecture.md describes each room."""

from pathlib import Path

# Commands of earlier versions, such as `python -m utils.push`, are found in this folder. They print their new name.
__path__ = [*__path__, str(Path(__file__).parent / 'old_commands')]

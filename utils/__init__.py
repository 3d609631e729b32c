"""The registries that users edit, and the rooms with all other code. docs/architecture.md describes the rooms."""

from pathlib import Path

# The folder old_commands contains the module names of earlier commands, such as `python -m utils.push`. Such a command
# prints its new name.
__path__ = [*__path__, str(Path(__file__).parent / 'old_commands')]

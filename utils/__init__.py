"""The registries that users edit, and rooms (folders) for all other code. docs/architecture.md describes each room."""

from pathlib import Path

# The folder old_commands has the commands of earlier versions, such as `python -m utils.push`. Each of these commands
# prints its new name.
__path__ = [*__path__, str(Path(__file__).parent / 'old_commands')]

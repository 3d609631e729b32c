"""The registries that users edit, and packages with all other code. docs/architecture.md describes each package."""

from pathlib import Path

# The folder old_commands has the commands of earlier versions, such as `python -m utils.push`. Each of these commands
# prints its new name.
__path__ = [*__path__, str(Path(__file__).parent / 'old_commands')]

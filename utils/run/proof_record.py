"""proofs.json: what a run checked about itself, one entry per proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.run.folder import write_json

PROOFS_JSON = 'proofs.json'


def record_proof(run_dir: Path, name: str, outcome: dict[str, Any]) -> None:
    """Put one entry into proofs.json, whole or not at all; the other entries stay. The main process alone writes."""
    if not dist.is_main():
        return
    file = run_dir / PROOFS_JSON
    proofs = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    write_json(file, {**proofs, name: outcome})

"""Regenerate utils/estimate/model_sizes.json: python benchmarks/model_sizes.py

Each shape holds the fields of a published configuration, and the counts of the real class with that configuration. To
add a model, add its configuration under `shapes` and its key under `models`, and run this program. The size of a model
without an entry is reported as unknown.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.estimate.model_shape import TABLE, Shape, shape_of
from utils.model import MODEL_MAPPING


def count(config: dict[str, Any], model_type: str) -> Shape:
    """Return the shape that the class of a registered model has with this configuration."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'config.json').write_text(json.dumps(config), encoding='utf-8')
        return shape_of(Path(folder), MODEL_MAPPING[model_type])


def render(table: dict[str, Any]) -> str:
    """Return the table as text, one shape on three lines."""
    shapes = []
    for name, entry in table['shapes'].items():
        config, shape = json.dumps(entry['config']), json.dumps(entry['shape'])
        shapes.append(f'  {json.dumps(name)}: {{\n   "config": {config},\n   "shape": {shape}}}')
    models = [f'  {json.dumps(key)}: {json.dumps(name)}' for key, name in table['models'].items()]
    return '{\n "shapes": {\n' + ',\n'.join(shapes) + '\n },\n "models": {\n' + ',\n'.join(models) + '\n }\n}\n'


def main() -> None:
    """Count every shape again and write the table."""
    table = json.loads(TABLE.read_text(encoding='utf-8'))
    for name, entry in table['shapes'].items():
        model_type = next(key for key, shape in table['models'].items() if shape == name)
        entry['shape'] = asdict(count(entry['config'], model_type))
        print(f'{name}: {entry["shape"]["model_class"]}, {entry["shape"]["parameters"]:,} parameters')
    TABLE.write_text(render(table), encoding='utf-8')


if __name__ == '__main__':
    main()

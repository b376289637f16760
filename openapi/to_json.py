#!/usr/bin/env python3
"""The specification as minified JSON, for the server to embed and to serve. Usage: to_json.py INPUT.yaml OUTPUT.json

Deterministic: the order of the file is kept, nothing is added. Needs PyYAML (Debian python3-yaml)."""
import json
import sys

import yaml


class Loader(yaml.SafeLoader):
    """YAML's JSON-like part: no timestamps from bare dates, no duplicate keys."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def mapping(loader, node, deep=False):
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", mapping)


def load(path):
    with open(path, encoding="utf-8") as f:
        return yaml.load(f, Loader)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    text = json.dumps(load(sys.argv[1]), ensure_ascii=False, separators=(",", ":"))
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        f.write(text)


if __name__ == "__main__":
    main()

"""Generate migrator/_pb from proto/: run by `make generate` and by the wheel's build.

protoc writes imports by the path of the .proto file (`migrator.v1`); the code lives in `migrator._pb`, because a
package named `proto` or a second `migrator` package would clash. The one rewrite is here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "migrator" / "_pb"


def main() -> int:
    OUT.mkdir(exist_ok=True)
    sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    common = [f"-I{ROOT / 'proto' / 'migrator' / 'v1'}"]
    outputs = [f"--python_out={OUT}", f"--pyi_out={OUT}", f"--grpc_python_out={OUT}"]
    failed = protoc.main(["protoc", *common, *outputs, *sources])
    if failed:
        return int(failed)
    (OUT / "__init__.py").write_text('"""Generated from proto/ by tools/genproto.py; not committed."""\n')
    for path in OUT.glob("*_pb2_grpc.py"):
        code = path.read_text()
        path.write_text(re.sub(r"^import (\w+_pb2) as", r"from migrator._pb import \1 as", code, flags=re.M))
    return 0


if __name__ == "__main__":
    sys.exit(main())

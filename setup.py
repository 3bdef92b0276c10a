"""What pyproject.toml cannot say: a wheel contains the compiled BPF programs and libvirt's hook."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datapath.build import SOURCES, compile_object


class BuildPy(build_py):
    """Puts switch.bpf.o into what is built; an editable install takes it from the tree (make bpf)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "datapath" / "bpf" / "switch.bpf.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            compile_object(SOURCES / "switch.bpf.c", target)
            hooks = Path(self.build_lib) / "migrator" / "_hooks"
            hooks.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(__file__).resolve().parent / "hooks" / "qemu", hooks / "qemu")


setup(cmdclass={"build_py": BuildPy})

"""What pyproject.toml cannot say: a wheel has the compiled BPF programs, libvirt's hook and lock driver, the units."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datapath.build import SOURCES, compile_object

HERE = Path(__file__).resolve().parent


class Wheel(bdist_wheel):
    """For any Python 3 of this machine's kind: nothing in it is a Python extension, but the lock driver is compiled."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


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
            shutil.copy2(HERE / "hooks" / "qemu", hooks / "qemu")
            shutil.copytree(HERE / "hooks" / "systemd", hooks / "systemd", dirs_exist_ok=True)
            subprocess.run([HERE / "tools" / "lock_driver", hooks / "migrator.so"], check=True)


setup(cmdclass={"bdist_wheel": Wheel, "build_py": BuildPy})

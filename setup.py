"Everything stands in settings.ini; this file hands it to setuptools, and copies what `tiny-nbdev reproduce` needs."

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
minimum = int(cfg["min_python"].split(".")[1])


class BuildWithTables(build_py):
    "Copies table notebooks, published numbers and last results below tiny_nbdev/tables, where `papers` looks for them."

    TABLES = (
        "nbs/tables/*.ipynb",
        "data/published/*.csv",
        "data/results/current/tint/*.csv",
        "data/results/current/tint/*.json",
        "data/results/current/loft/*.csv",
        "data/results/current/loft/*.json",
        "data/results/current/sidclip/*.csv",
        "data/results/current/sidclip/*.json",
        "data/results/current/tint/baselines/*.csv",
    )

    def tables(self):  # Pairs: a file here, and its copy
        home = Path(self.build_lib) / cfg["lib_name"] / "tables"
        return [(file, home / file) for pattern in self.TABLES for file in sorted(Path().glob(pattern))]

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable installation reads them in the clone
            for file, copy in self.tables():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)

    def get_outputs(self, include_bytecode=True):
        copies = [] if self.editable_mode else [str(copy) for _, copy in self.tables()]
        return super().get_outputs(include_bytecode) + copies


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
    ]
    + [f"Programming Language :: Python :: 3.{v}" for v in range(minimum, 13)],
    packages=find_packages(include=["tiny_nbdev", "tiny_nbdev.*"]),
    package_data={"tiny_nbdev": ["weights/**/*", "lists/*.json", "presets/*.json"]},
    cmdclass={"build_py": BuildWithTables},
    python_requires=f">={cfg['min_python']},<3.13",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "tables": cfg["tables_requirements"].split(),
        "heif": cfg["heif_requirements"].split(),
        "lora": cfg["lora_requirements"].split(),
        "clip": cfg["clip_requirements"].split(),
        "cluster": cfg["cluster_requirements"].split(),
        "app": cfg["app_requirements"].split(),
        "tflite": cfg["tflite_requirements"].split(),
        "dev": [
            r
            for part in ("tables", "heif", "lora", "clip", "cluster", "app", "dev")
            for r in cfg[f"{part}_requirements"].split()
        ],
    },
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)

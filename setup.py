"""Which folders go into the package; everything else about it is in pyproject.toml.

The commands, configs/, datasets/ and tools/ stand beside detr/ in a checkout. Installed, they are in detr/commands/,
since `datasets` and `train` are names of others too. detr/cli/launch.py runs them there.
"""

from setuptools import find_namespace_packages, setup


def folders(*names: str) -> list[str]:
    return find_namespace_packages(include=[f"{name}*" for name in names], exclude=["*__pycache__*"])


setup(
    script_name="setup.py",  # the one file of this folder that is no command
    packages=[
        *folders("detr"),
        "detr.commands",
        *(f"detr.commands.{name}" for name in folders("configs", "datasets", "tools")),
    ],
    package_dir={"detr.commands": "."},
    package_data={"": ["*.yaml", "*.j2", "*.html", "*.css", "*.js", "*.svg"]},
    include_package_data=False,  # it would take tests and docs for data of detr.commands
)

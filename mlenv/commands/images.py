"""The commands about container images: ``mlenv image``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlenv.errors import DONE, ConfigError, check_at_least

if TYPE_CHECKING:
    from mlenv.images.build import BuildOptions
    from mlenv.images.inputs import Inputs

REGISTRY: Final = "MLENV_IMAGE_REGISTRY"
SERVICE: Final = "MLENV_IMAGE_SERVICE"
TOKEN: Final = "MLENV_IMAGE_TOKEN"


def add_image_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    text = "Build, move and run container images: those of the catalogue, and those that mlenv.yaml or pyproject.toml declares."
    group = verbs.add_parser("image", help=text, description=text).add_subparsers(required=True, metavar="VERB")

    made = _verb(group, verb, "build", _build, "Build an image, unless one of the same inputs is here or in the registry.")
    made.add_argument("name", help="image of mlenv.yaml, pyproject.toml or the catalogue")
    _add_registry(made)
    _add_build_options(made)
    made.add_argument("--push", action="store_true", help="send it to the registry")
    made.add_argument("--service", default=os.environ.get(SERVICE, ""), metavar="URL", help=f"let mlenv image serve build it; {SERVICE}")
    made.add_argument("--quiet", action="store_true", help="print the name of the image alone")

    _verb(group, verb, "list", _list, "List the images of mlenv on this machine.")

    made = _verb(group, verb, "show", _show, "Show an image: size, labels, what is installed.")
    _add_name(made)
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dockerfile", action="store_true", help="print the Dockerfile of a declared image; needs no engine")
    what.add_argument("--sbom", action="store_true", help="print its bill of materials, CycloneDX JSON")

    made = _verb(group, verb, "push", _push, "Send an image to the registry; prints its digest.")
    _add_name(made)
    made = _verb(group, verb, "pull", _pull, "Fetch an image from the registry, by its declaration, its tag or its digest.")
    _add_name(made)

    made = _verb(
        group, verb, "run", _run, "Run the command after -- in an image, or the image's own: mlenv image run NAME -- mlenv train ..."
    )
    _add_name(made)
    made.set_defaults(command=[])
    made.add_argument("--data", action="append", default=[], metavar="FOLDER", help="to read; at the same place inside; may be given again")
    made.add_argument("--out", action="append", default=[], metavar="FOLDER", help="to write; at the same place inside; may be given again")
    made.add_argument("--gpus", default="auto", help="auto: all that the engine has; none, all, or how many")
    made.add_argument("--shm-size", default="2g", help="memory that processes share")
    made.add_argument("--network", default="", help="the engine's default when left out")
    made.add_argument("--container", default="", metavar="NAME", help="by which others on its network find it")
    made.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment variable; without a value, as here")
    made.add_argument("--publish", action="append", default=[], metavar="[HOST:]PORT", help="port to open to this machine")
    made.add_argument("--memlock", type=int, help="bytes that may be locked in memory, -1 for any number; for NCCL")
    made.add_argument("--nofile", type=int, help="files that may be open at once")
    made.add_argument("--privileged", action="store_true", help="give the container all rights of the engine")

    made = _verb(group, verb, "prune", _prune, "Remove old images of mlenv from this machine.")
    made.add_argument("--keep", type=int, default=3, help="newest images of each name that stay")

    made = _verb(group, verb, "serve", _serve, "Build images for others, over HTTP, one after the other.")
    made.add_argument("--tokens", type=Path, required=True, help="file with the tokens that clients may name, one a line")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    made.add_argument("--port", type=int, default=8070)
    made.add_argument("--folder", type=Path, required=True, help="where uploads and logs lie")
    made.add_argument("--max-queue", type=int, default=20, help="images that wait; more clients are told to come again")
    made.add_argument("--max-context-mb", type=int, default=500, help="size of one upload")
    _add_registry(made)
    _add_build_options(made)


def _verb(
    group: Any, verb: Callable[..., argparse.ArgumentParser], name: str, run: Callable[..., int], text: str
) -> argparse.ArgumentParser:
    return verb(group, name, partial(_without_settings, run), text)


def _without_settings(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    if options.overrides:
        fix = "change the image in mlenv.yaml; a command to run comes after --"
        raise ConfigError(" ".join(options.overrides), expected="no settings here", received=options.overrides[0], fix=fix)
    return run(options)


def _add_registry(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--registry", default=os.environ.get(REGISTRY, ""), metavar="HOST/PATH", help=f"that image names begin with; {REGISTRY}"
    )


def _add_name(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", help="declared image, or NAME:TAG, or NAME@DIGEST")
    _add_registry(made)


def _add_build_options(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--secret", action="append", default=[], metavar="NAME=FILE", help="ca, pip, apt or netrc: there for the build, in no layer"
    )
    made.add_argument("--network", default="", help="of the build; the engine's default when left out")
    made.add_argument("--timeout-minutes", type=float, default=60)


def _build_options(options: argparse.Namespace) -> BuildOptions:
    from mlenv.images.build import BuildOptions

    secrets = dict(_named(secret, "--secret", "NAME=FILE") for secret in options.secret)
    return BuildOptions(
        registry=options.registry,
        secrets={name: Path(file) for name, file in secrets.items()},
        network=options.network,
        timeout_minutes=options.timeout_minutes,
    )


def _named(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(option, expected=form, received=text)
    return name, value


@contextmanager
def _packed(name: str) -> Iterator[tuple[Inputs, Path]]:
    """The inputs of a declared image, and their context while it lasts."""
    from mlenv.images.declared import find_image
    from mlenv.images.inputs import pack

    with tempfile.TemporaryDirectory(prefix="mlenv-image-") as folder:
        context = Path(folder) / "context"
        yield pack(find_image(Path(), name), context), context


def _reference(engine: Any, name: str, registry: str) -> str:
    """What the engine calls an image."""
    from mlenv.images.build import reference_of

    if ":" in name or "@" in name:
        return name
    with _packed(name) as (inputs, _):
        return reference_of(engine, inputs, registry)[0]


def _build(options: argparse.Namespace) -> int:
    from mlenv.images.build import build, git_labels
    from mlenv.images.engine import connect
    from mlenv.images.transfer import push

    wanted = _build_options(options)
    if options.push and not options.registry:
        raise ConfigError("--push", expected="a registry beside it", received="none", fix=f"--registry HOST/PATH, or set {REGISTRY}")
    with _packed(options.name) as (inputs, context):
        if options.dry_run:
            print(inputs.dockerfile, end="")
            return DONE
        log: Callable[[str], None] = (lambda line: None) if options.quiet else print
        if options.service:
            from mlenv.images.build_client import build_at

            print(build_at(options.service, os.environ.get(TOKEN, ""), inputs, context, labels=git_labels(Path()), log=log))
            return DONE
        engine = connect()
        image = build(engine, inputs, context, wanted, labels=git_labels(Path()), log=log)
    if options.push and not image.is_remote:
        print(push(engine, image.reference, log))
        return DONE
    print(image.reference if options.quiet or image.is_new else f"{image.reference}, which was built before")
    return DONE


def _list(options: argparse.Namespace) -> int:
    from mlenv.images.engine import connect
    from mlenv.images.kept import kept_images

    if options.dry_run:
        print("would list the images of mlenv on this machine")
        return DONE
    for image in kept_images(connect()):
        print(image)
    return DONE


def _show(options: argparse.Namespace) -> int:
    if options.dockerfile:
        with _packed(options.name) as (inputs, _):
            print(inputs.dockerfile, end="")
        return DONE
    if options.dry_run:
        print(f"would show {options.name}")
        return DONE
    from mlenv.images.engine import connect
    from mlenv.images.kept import bill_of_materials, describe

    engine = connect()
    reference = _reference(engine, options.name, options.registry)
    if options.sbom:
        print(json.dumps(bill_of_materials(engine, reference), indent=1))
        return DONE
    image = describe(engine, reference)
    print(image)
    if image.digest:
        print(f"digest  {image.digest}")
    for name, value in sorted(image.labels.items()):
        print(f"{name}  {value}")
    return DONE


def _push(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would push {options.name}")
        return DONE
    from mlenv.images.engine import connect
    from mlenv.images.transfer import push

    engine = connect()
    reference = _reference(engine, options.name, options.registry)
    if "/" not in reference:
        raise ConfigError("--registry", expected="a registry to push to", received="none", fix=f"--registry HOST/PATH, or set {REGISTRY}")
    print(push(engine, reference))
    return DONE


def _pull(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would pull {options.name}")
        return DONE
    from mlenv.images.engine import connect
    from mlenv.images.transfer import pull

    engine = connect()
    reference = _reference(engine, options.name, options.registry)
    pull(engine, reference)
    print(reference)
    return DONE


def _run(options: argparse.Namespace) -> int:
    from mlenv.images.run import RunOptions, run

    wanted = RunOptions(
        data=options.data,
        out=options.out,
        gpus=options.gpus,
        shared_memory=options.shm_size,
        network=options.network,
        name=options.container,
        environment=dict(_variable(text) for text in options.env),
        publish=options.publish,
        memlock=options.memlock,
        nofile=options.nofile,
        privileged=options.privileged,
    )
    if options.dry_run:
        print(f"would run {' '.join(options.command) or 'its own command'} in {options.name}")
        return DONE
    from mlenv.images.engine import connect

    engine = connect()
    return run(engine, _reference(engine, options.name, options.registry), options.command, wanted)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise ConfigError("--env", expected="NAME=VALUE, or the name of a variable that is set here", received=text)
    return name, value if equals else os.environ[name]


def _prune(options: argparse.Namespace) -> int:
    from mlenv.images.engine import connect
    from mlenv.images.kept import kept_images, old_images, remove

    check_at_least("--keep", options.keep, 0)
    engine = connect()
    for image in old_images(kept_images(engine), options.keep):
        if not options.dry_run:
            remove(engine, image)
        print(f"{'would remove' if options.dry_run else 'removed'} {image.reference}")
    return DONE


def _serve(options: argparse.Namespace) -> int:
    from mlenv.images.build_service import ServiceOptions, read_tokens, serve

    wanted = ServiceOptions(
        host=options.host,
        port=options.port,
        folder=options.folder,
        tokens=read_tokens(options.tokens),
        max_queue=options.max_queue,
        max_context_bytes=options.max_context_mb << 20,
        build=_build_options(options),
    )
    if options.dry_run:
        print(f"would build images for others at http://{wanted.host}:{wanted.port}")
        return DONE
    from mlenv.images.engine import connect

    serve(connect(), wanted)
    return DONE

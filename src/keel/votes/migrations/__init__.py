"""How the tables came to be, by Alembic: `versions/` holds one file a change of the schema.

`upgrade` brings a database to the newest schema. It is called when a store is opened.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from keel.errors import UsageError
from keel.votes import missing, schema
from keel.votes.database import Database

FOLDER = Path(__file__).parent
_LOCK = 0x6B65656C  # PostgreSQL's advisory lock while the tables are made


def revision_of(connection: Connection) -> str | None:
    """The revision of the tables that are there; None where there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def upgrade(database: Database, head: str | None = None, folder: Path | None = None) -> bool:
    """Bring the tables to `head`, the newest; whether anything was to be done.

    UsageError for tables of a newer keel, and for a database that holds something else.
    """
    head = head or schema.HEAD
    if database.read(revision_of) == head:
        return False
    return database.write(_upgrade, head, folder or FOLDER, database.shown)


def _upgrade(connection: Connection, head: str, folder: Path, shown: str) -> bool:
    try:
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory
    except ModuleNotFoundError as error:
        raise missing(error) from None
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    current = revision_of(connection)
    if current == head:
        return False  # another process was faster
    if current is None and inspect(connection).get_table_names():
        raise UsageError(f"{shown} holds tables of something else: give keel a database of its own")
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise UsageError(
            f"{shown} was written by a newer keel (schema {current}, this one knows {head}): "
            "pip install --upgrade keel-rlhf"
        )
    command.upgrade(config, head)
    return True

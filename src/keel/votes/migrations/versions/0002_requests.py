"""Invitations can be withdrawn; skips, flags and undos are known by their client's id."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Two columns and a table."""
    op.add_column("invitations", sa.Column("withdrawn", sa.Double(), nullable=True))
    op.add_column("invitations", sa.Column("origin", sa.String(length=16), nullable=True))
    op.create_table(
        "requests",
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("deed", sa.String(length=16), nullable=False),
        sa.Column("client_id", sa.String(length=200), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.Integer(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name=op.f("fk_requests_item_id")),
        sa.ForeignKeyConstraint(["person_id"], ["people.id"], name=op.f("fk_requests_person_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_requests_project_id")),
        sa.PrimaryKeyConstraint("person_id", "deed", "client_id", name=op.f("pk_requests")),
    )

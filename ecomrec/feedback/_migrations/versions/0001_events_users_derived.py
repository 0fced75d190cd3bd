"""Events, users, what was derived from them, and whose keyring seals them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# Compared byte by byte, on PostgreSQL too: the order of events must not hang on a server's language.
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade():
    op.create_table(
        "events",
        sa.Column("event_id", TEXT, primary_key=True),
        sa.Column("ts", sa.BigInteger, nullable=False),
        sa.Column("user_id", TEXT),
        sa.Column("session_id", TEXT, nullable=False),
        sa.Column("request_id", TEXT),
        sa.Column("surface", TEXT),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("query", sa.LargeBinary),  # sealed
        sa.Column("item_id", TEXT),
        sa.Column("position", sa.BigInteger),
        sa.Column("propensity", sa.Double),
        sa.Column("policy", TEXT),
        sa.Column("price", sa.Double),
        sa.Column("quantity", sa.BigInteger),
        sa.Column("stars", sa.Double),
        sa.Column("device", TEXT),
    )
    op.create_index("events_by_time", "events", ["ts", "event_id"])
    op.create_index("events_by_user", "events", ["user_id", "ts"])
    op.create_index("events_by_session", "events", ["session_id"])
    op.create_table(
        "users",
        sa.Column("user_id", TEXT, primary_key=True),
        sa.Column("age", sa.LargeBinary),  # sealed, as are the next two
        sa.Column("gender", sa.LargeBinary),
        sa.Column("region", sa.LargeBinary),
        sa.Column("joined_ts", sa.BigInteger),
    )
    op.create_table(
        "derived",
        sa.Column("path", TEXT, primary_key=True),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("sha256", TEXT),
        sa.Column("made_ts", sa.BigInteger, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("forgotten", sa.BigInteger, nullable=False),
    )
    op.create_table("keyring", sa.Column("id", TEXT, primary_key=True))

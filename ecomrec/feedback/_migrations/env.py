"""What alembic runs to bring a store's schema up to date, on the connection and in the transaction that the store hands over."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table="store_version", transactional_ddl=True)
context.run_migrations()

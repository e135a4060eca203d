-- A role for the definition server: it reads one table and nothing else. Run it again to change password or limit.
--
--   psql "$ADMIN_DATABASE_URL" -v password="$DB_PASSWORD" -f deploy/sql/role.sql
--
-- Run it as the owner of the table, with the right to create roles; that role need not be a superuser. -v connections=N
-- sets another limit of connections than 50. Each replica keeps one; for a moment twice as many may be open, during a
-- rollout or because the database has not noticed that a connection is half-open.
--
-- The role also has the privileges of PUBLIC: temporary tables, other tables granted to PUBLIC, and on PostgreSQL 14 or
-- older its own tables in the schema public. If the database is shared, revoke these from PUBLIC:
--   REVOKE CREATE ON SCHEMA public FROM PUBLIC;
--   REVOKE TEMPORARY ON DATABASE … FROM PUBLIC;
\set ON_ERROR_STOP on
\if :{?password}
\else
DO $$ BEGIN RAISE EXCEPTION 'no password given' USING HINT = 'psql -v password=… -f deploy/sql/role.sql'; END $$;
\endif
\if :{?connections}
\else
\set connections 50
\endif

BEGIN;
SELECT 'CREATE ROLE definition_server'
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'definition_server') \gexec
ALTER ROLE definition_server LOGIN CONNECTION LIMIT :connections PASSWORD :'password';
ALTER ROLE definition_server SET default_transaction_read_only = on;
-- A server that is stopped in the middle of a reading blocks VACUUM no longer than this.
ALTER ROLE definition_server SET idle_in_transaction_session_timeout = '5min';
GRANT SELECT ON obex_dapl_functions TO definition_server;
-- Bytecode of the commands, where there is that table.
SELECT 'GRANT SELECT ON avap_bytecode TO definition_server' WHERE to_regclass('avap_bytecode') IS NOT NULL \gexec
COMMIT;

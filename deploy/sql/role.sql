-- A role for the definition server: it reads one table and nothing else. Run it again to change password or limit.
--
--   psql "$ADMIN_DATABASE_URL" -v password="$DB_PASSWORD" -f deploy/sql/role.sql
--
-- As the owner of the table who may create roles; it need not be a superuser. -v connections=N for another limit than
-- 50: each replica keeps one connection, and twice as many as there are replicas may be open for a moment (a rollout,
-- or half-open ones that the database has not noticed yet).
--
-- What every role may do because PUBLIC may stays: temporary tables, other tables granted to PUBLIC, and on PostgreSQL
-- 14 or older tables of its own in the schema public. Where the database is shared, take that from PUBLIC:
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
-- A server that is stopped in the middle of a reading holds up VACUUM no longer than this.
ALTER ROLE definition_server SET idle_in_transaction_session_timeout = '5min';
GRANT SELECT ON obex_dapl_functions TO definition_server;
COMMIT;

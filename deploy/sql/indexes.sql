-- Optional; run it as the owner of the table. While the index is built, reading continues and writing waits.
--
--   psql "$ADMIN_DATABASE_URL" -f deploy/sql/indexes.sql
--
-- The server itself uses no index: a change check reads the version of every row (ctid, xmin), which no index holds,
-- and a reading fetches every row. These two statements keep the table free of duplicates and of dead rows.
\set ON_ERROR_STOP on

BEGIN;
-- Of rows with the same name the server serves the one with the highest id and reports the others. With this index
-- PostgreSQL refuses to write a second one. The index cannot be built while there are duplicates:
-- `definition-server validate` names them.
CREATE UNIQUE INDEX IF NOT EXISTS obex_dapl_functions_name ON obex_dapl_functions (name);
-- A change check also reads dead row versions until VACUUM has removed them: now at 5 % of dead rows instead of 20 %.
ALTER TABLE obex_dapl_functions SET (autovacuum_vacuum_scale_factor = 0.05);
COMMIT;

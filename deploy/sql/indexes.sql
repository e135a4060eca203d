-- Optional, for whoever owns the table. Reading goes on meanwhile; writing waits while the index is built.
--
--   psql "$ADMIN_DATABASE_URL" -f deploy/sql/indexes.sql
--
-- The server itself needs no index and uses none: a look reads the version of every row (ctid, xmin), which no index
-- holds, and a reading takes every row. What these two do for it is keep the table in order.
\set ON_ERROR_STOP on

BEGIN;
-- Of rows with the same name the server serves the one with the highest id and reports the others. With this index the
-- second one is refused when somebody writes it. It cannot be built while there are any: `definition-server validate`
-- names them.
CREATE UNIQUE INDEX IF NOT EXISTS obex_dapl_functions_name ON obex_dapl_functions (name);
-- A look reads dead row versions too, until VACUUM has taken them away: after 5 % of dead rows rather than 20 %.
ALTER TABLE obex_dapl_functions SET (autovacuum_vacuum_scale_factor = 0.05);
COMMIT;

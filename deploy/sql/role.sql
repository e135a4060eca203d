-- A role for the definition server: it reads one table and can do nothing else.
-- psql -v password="'…'" -f deploy/sql/role.sql
CREATE ROLE definition_server LOGIN PASSWORD :password CONNECTION LIMIT 10;
ALTER ROLE definition_server SET default_transaction_read_only = on;
GRANT SELECT ON obex_dapl_functions TO definition_server;

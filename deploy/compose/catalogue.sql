-- The table as deployments have it, and three sample commands; does nothing if the table exists.
SET client_min_messages = warning;
DO $$
BEGIN
    IF to_regclass('obex_dapl_functions') IS NOT NULL THEN
        RETURN;
    END IF;
    CREATE TABLE obex_dapl_functions (
        id SERIAL PRIMARY KEY,
        name VARCHAR(100),
        interface TEXT,
        description TEXT,
        type VARCHAR(50),
        logic BOOLEAN,
        componenttype VARCHAR(50),
        service VARCHAR(50),
        command VARCHAR(50),
        code TEXT
    );
    INSERT INTO obex_dapl_functions (name, type, interface, code) VALUES
        ('addVar', 'function', '[{"item": "name", "type": "value"}, {"item": "value", "type": "variable"}]',
         'scope[args["name"]] = args["value"]'),
        ('upper', 'function', '[{"item": "text", "type": "variable"}]', 'result = str(args["text"]).upper()'),
        ('length', 'function', '[{"item": "text", "type": "variable"}]', 'result = len(args["text"])');
END
$$;

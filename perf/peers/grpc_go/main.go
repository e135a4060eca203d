// The catalogue on grpc-go. perf/peers/__init__.py describes what a peer receives and answers.
package main

import (
	"context"
	"crypto/subtle"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// field returns the content of the first length-delimited field with that number, nil if there is none.
func field(message []byte, wanted protowire.Number) ([]byte, error) {
	for len(message) > 0 {
		number, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		message = message[size:]
		if number == wanted && kind == protowire.BytesType {
			content, size := protowire.ConsumeBytes(message)
			return content, protowire.ParseError(size)
		}
		if size = protowire.ConsumeFieldValue(number, kind, message); size < 0 {
			return nil, protowire.ParseError(size)
		}
		message = message[size:]
	}
	return nil, nil
}

// A codec for answers that were encoded before the measurement.
type encoded struct{}

func (encoded) Name() string { return "proto" }

func (encoded) Marshal(answer any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(answer.([]byte))}, nil
}

// CommandRequest and Empty: a name, or none.
func (encoded) Unmarshal(octets mem.BufferSlice, request any) error {
	buffer := octets.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buffer.Free()
	name, err := field(buffer.ReadOnlyData(), 1)
	*request.(*string) = string(name)
	return err
}

var _ encoding.CodecV2 = encoded{}

type catalogue struct {
	key, all []byte
	commands map[string][]byte
}

// newCatalogue takes a serialized CatalogResponse: every command is a slice of it.
func newCatalogue(key, all []byte) (*catalogue, error) {
	made := &catalogue{key, all, make(map[string][]byte)}
	for rest := all; len(rest) > 0; {
		number, kind, size := protowire.ConsumeTag(rest)
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		content := rest[size:]
		length := protowire.ConsumeFieldValue(number, kind, content)
		if length < 0 {
			return nil, protowire.ParseError(length)
		}
		rest = content[length:]
		if number != 1 {
			continue
		}
		command, _ := protowire.ConsumeBytes(content)
		name, err := field(command, 1)
		if err != nil {
			return nil, err
		}
		made.commands[string(name)] = command
	}
	return made, nil
}

func (c *catalogue) letIn(ctx context.Context) error {
	values := metadata.ValueFromIncomingContext(ctx, "x-avap-auth")
	if len(values) == 1 && subtle.ConstantTimeCompare([]byte(values[0]), c.key) == 1 {
		return nil
	}
	return status.Error(codes.Unauthenticated, "Invalid Credentials")
}

func (c *catalogue) get(ctx context.Context, name string) ([]byte, error) {
	if answer, found := c.commands[name]; found {
		return answer, nil
	}
	return nil, status.Errorf(codes.NotFound, "Command '%s' not found", name)
}

func (c *catalogue) sync(context.Context, string) ([]byte, error) {
	return c.all, nil
}

// method is what protoc-gen-go-grpc would generate.
func method(name string, handle func(*catalogue, context.Context, string) ([]byte, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(
		server any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor,
	) (any, error) {
		var request string
		if err := decode(&request); err != nil {
			return nil, err
		}
		c := server.(*catalogue)
		if err := c.letIn(ctx); err != nil {
			return nil, err
		}
		// A typed nil beside an error would be an answer for grpc-go.
		answer, err := handle(c, ctx, request)
		if err != nil {
			return nil, err
		}
		return answer, nil
	}}
}

func main() {
	workers, err := strconv.Atoi(os.Getenv("PEER_WORKERS"))
	check(err)
	runtime.GOMAXPROCS(workers)
	all, err := os.ReadFile(os.Getenv("PEER_CATALOGUE"))
	check(err)
	served, err := newCatalogue([]byte(os.Getenv("PEER_KEY")), all)
	check(err)
	options := []grpc.ServerOption{grpc.ForceServerCodecV2(encoded{})}
	if certificate := os.Getenv("PEER_TLS_CERT"); certificate != "" {
		secure, err := credentials.NewServerTLSFromFile(certificate, os.Getenv("PEER_TLS_KEY"))
		check(err)
		options = append(options, grpc.Creds(secure))
	}
	server := grpc.NewServer(options...)
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "avap.DefinitionEngine",
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{
			method("GetCommand", (*catalogue).get),
			method("SyncCatalog", (*catalogue).sync),
		},
	}, served)
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("PEER_PORT"))
	check(err)
	fmt.Println(os.Getenv("PEER_PORT"))
	// When standard input ends, the process that started this one has ended.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	check(server.Serve(listener))
}

// Reads a catalogue with grpc-go and prints what it got as JSON: catalogue HOST:PORT KEY DESCRIPTORS CALLS.
// DESCRIPTORS is a file with the serialized FileDescriptorSet of avap.proto.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type client struct {
	connection *grpc.ClientConn
	service    protoreflect.ServiceDescriptor
}

// One call with a deadline of its own.
func (c *client) call(method, name, key string) (*dynamicpb.Message, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "x-avap-auth", key)
	described := c.service.Methods().ByName(protoreflect.Name(method))
	request := dynamicpb.NewMessage(described.Input())
	if field := described.Input().Fields().ByName("name"); field != nil {
		request.Set(field, protoreflect.ValueOfString(name))
	}
	answer := dynamicpb.NewMessage(described.Output())
	err := c.connection.Invoke(ctx, "/avap.DefinitionEngine/"+method, request, answer,
		grpc.MaxCallRecvMsgSize(1<<30))
	return answer, err
}

func failure(_ *dynamicpb.Message, err error) map[string]any {
	told := status.Convert(err)
	return map[string]any{"code": int(told.Code()), "details": told.Message()}
}

func main() {
	target, key, calls := os.Args[1], os.Args[2], 0
	octets, err := os.ReadFile(os.Args[3])
	check(err)
	calls, err = strconv.Atoi(os.Args[4])
	check(err)
	var set descriptorpb.FileDescriptorSet
	check(proto.Unmarshal(octets, &set))
	files, err := protodesc.NewFiles(&set)
	check(err)
	described, err := files.FindDescriptorByName("avap.DefinitionEngine")
	check(err)
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	defer connection.Close()
	c := &client{connection, described.(protoreflect.ServiceDescriptor)}

	catalogue, err := c.call("SyncCatalog", "", key)
	check(err)
	list := catalogue.Get(catalogue.Descriptor().Fields().ByName("commands")).List()
	equal := 0
	for i := range calls {
		wanted := list.Get(i % list.Len()).Message()
		name := wanted.Get(wanted.Descriptor().Fields().ByName("name")).String()
		answer, err := c.call("GetCommand", name, key)
		check(err)
		if proto.Equal(answer, wanted.Interface()) {
			equal++
		}
	}
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(catalogue)
	check(err)
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"catalogue": json.RawMessage(text),
		"equal":     equal,
		"missing":   failure(c.call("GetCommand", "nichts / 無", key)),
		"refused":   failure(c.call("GetCommand", "if", "wrong")),
	}))
}

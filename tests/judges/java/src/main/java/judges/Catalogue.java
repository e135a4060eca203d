package judges;

import com.google.protobuf.ByteString;
import com.google.protobuf.DescriptorProtos.FileDescriptorSet;
import com.google.protobuf.Descriptors.Descriptor;
import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.Descriptors.FileDescriptor;
import com.google.protobuf.Descriptors.ServiceDescriptor;
import com.google.protobuf.DynamicMessage;
import com.google.protobuf.util.JsonFormat;
import io.grpc.CallOptions;
import io.grpc.ClientInterceptors;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.ProtoUtils;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.TimeUnit;

/**
 * Reads a catalogue with grpc-java and prints what it got as JSON: {@code HOST:PORT KEY DESCRIPTORS CALLS}.
 * DESCRIPTORS is a file with the serialized FileDescriptorSet of avap.proto.
 */
public final class Catalogue {
  private static final Metadata.Key<String> KEY = Metadata.Key.of("x-avap-auth", Metadata.ASCII_STRING_MARSHALLER);

  private final ManagedChannel channel;
  private final ServiceDescriptor service;

  private Catalogue(ManagedChannel channel, ServiceDescriptor service) {
    this.channel = channel;
    this.service = service;
  }

  /** One call with a deadline of its own. */
  private DynamicMessage call(String name, String argument, String key) {
    var described = service.findMethodByName(name);
    var request = DynamicMessage.newBuilder(described.getInputType());
    FieldDescriptor field = described.getInputType().findFieldByName("name");
    if (field != null) {
      request.setField(field, argument);
    }
    var method = MethodDescriptor.<DynamicMessage, DynamicMessage>newBuilder()
        .setType(MethodDescriptor.MethodType.UNARY)
        .setFullMethodName(MethodDescriptor.generateFullMethodName(service.getFullName(), name))
        .setRequestMarshaller(ProtoUtils.marshaller(empty(described.getInputType())))
        .setResponseMarshaller(ProtoUtils.marshaller(empty(described.getOutputType())))
        .build();
    var metadata = new Metadata();
    metadata.put(KEY, key);
    var keyed = ClientInterceptors.intercept(channel, MetadataUtils.newAttachHeadersInterceptor(metadata));
    var options = CallOptions.DEFAULT.withDeadlineAfter(30, TimeUnit.SECONDS);
    return ClientCalls.blockingUnaryCall(keyed, method, options, request.build());
  }

  private static DynamicMessage empty(Descriptor type) {
    return DynamicMessage.getDefaultInstance(type);
  }

  private String failure(String name, String key) {
    try {
      call("GetCommand", name, key);
    } catch (StatusRuntimeException error) {
      var status = error.getStatus();
      return String.format("{\"code\": %d, \"details\": \"%s\"}", status.getCode().value(), status.getDescription());
    }
    return "\"the call succeeded\"";
  }

  private void read(String key, int calls, PrintStream out) throws Exception {
    DynamicMessage catalogue = call("SyncCatalog", "", key);
    FieldDescriptor commands = catalogue.getDescriptorForType().findFieldByName("commands");
    FieldDescriptor name = commands.getMessageType().findFieldByName("name");
    int count = catalogue.getRepeatedFieldCount(commands);
    int equal = 0;
    for (int i = 0; i < calls; i++) {
      var wanted = (DynamicMessage) catalogue.getRepeatedField(commands, i % count);
      if (call("GetCommand", (String) wanted.getField(name), key).equals(wanted)) {
        equal++;
      }
    }
    var printer = JsonFormat.printer().preservingProtoFieldNames().includingDefaultValueFields();
    out.printf("{\"catalogue\": %s, \"equal\": %d, \"missing\": %s, \"refused\": %s}%n",
        printer.print(catalogue), equal, failure("nichts / 無", key), failure("if", "wrong"));
  }

  public static void main(String[] arguments) throws Exception {
    var set = FileDescriptorSet.parseFrom(ByteString.copyFrom(Files.readAllBytes(Path.of(arguments[2]))));
    var file = FileDescriptor.buildFrom(set.getFile(0), new FileDescriptor[0]);
    var channel = NettyChannelBuilder.forTarget(arguments[0]).usePlaintext().maxInboundMessageSize(1 << 30).build();
    try {
      var out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
      new Catalogue(channel, file.findServiceByName("DefinitionEngine"))
          .read(arguments[1], Integer.parseInt(arguments[3]), out);
    } finally {
      channel.shutdownNow().awaitTermination(10, TimeUnit.SECONDS);
    }
  }
}

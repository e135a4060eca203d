// Keeps two connections open with grpc-go, as a client that pings every 10 seconds: pings HOST:PORT SECONDS.
// One connection holds a health Watch, the other has no call. Prints how often each was lost, as JSON.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func connect(target string) *grpc.ClientConn {
	pings := keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(pings))
	check(err)
	_, err = health.NewHealthClient(connection).Check(context.Background(), &health.HealthCheckRequest{})
	check(err)
	return connection
}

func main() {
	seconds, err := strconv.Atoi(os.Args[2])
	check(err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(seconds)*time.Second)
	defer cancel()
	idle, watching := connect(os.Args[1]), connect(os.Args[1])
	lost := make(chan int)
	go func() {
		count := 0
		for idle.WaitForStateChange(ctx, connectivity.Ready) {
			count++
			idle.Connect()
			for idle.GetState() != connectivity.Ready && idle.WaitForStateChange(ctx, idle.GetState()) {
			}
		}
		lost <- count
	}()
	ended := 0
	for ctx.Err() == nil {
		stream, err := health.NewHealthClient(watching).Watch(ctx, &health.HealthCheckRequest{})
		for err == nil {
			_, err = stream.Recv()
		}
		// The deadline of the call may be noticed a little earlier than that of the context.
		if ctx.Err() == nil && status.Code(err) != codes.DeadlineExceeded {
			ended++
		}
	}
	check(json.NewEncoder(os.Stdout).Encode(map[string]int{"idle": <-lost, "watching": ended}))
}
